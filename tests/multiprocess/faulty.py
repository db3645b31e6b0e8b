"""jaxtune's command line, with a fault of JAXTUNE_FAULT at the fifth batch of process 1.

``raise``: an exception. ``sleep``: the process lives on and makes no step. ``none``: no fault.
It also says how many bytes of the weights each process has read.
"""

import logging
import os
import time

from jaxtune.cli import main
from jaxtune.data.loader import Loader

fault = os.environ.get("JAXTUNE_FAULT", "none")
plain = Loader.__next__
batches = 0


def faulty(self):
    global batches
    batches += 1
    if batches == 5 and fault == "raise":
        raise RuntimeError("the fifth batch is cursed")
    if batches == 5 and fault == "sleep":
        time.sleep(600)
    return plain(self)


logging.getLogger("jaxtune.checkpoints.loading").setLevel(logging.DEBUG)
if os.environ.get("JAXTUNE_PROCESS") == "1":
    Loader.__next__ = faulty
main()
