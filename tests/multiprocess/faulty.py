"""jaxtune's command line, with a fault that JAXTUNE_FAULT names.

``raise``: an exception at the fifth batch of process 1. ``sleep``: process 1 lives on from there
and makes no step. ``pause``: every process waits before its eighth batch, for others to act.
It also says how many bytes of the weights each process has read.
"""

import logging
import os
import time

from jaxtune.cli import main
from jaxtune.data.loader import Loader

fault = os.environ.get("JAXTUNE_FAULT", "none")
chosen = os.environ.get("JAXTUNE_PROCESS") == "1"
plain = Loader.__next__
batches = 0


def faulty(self):
    global batches
    batches += 1
    if batches == 5 and chosen and fault == "raise":
        raise RuntimeError("the fifth batch is cursed")
    if batches == 5 and chosen and fault == "sleep":
        time.sleep(600)
    if batches == 8 and fault == "pause":
        time.sleep(5)
    return plain(self)


logging.getLogger("jaxtune.checkpoints.loading").setLevel(logging.DEBUG)
Loader.__next__ = faulty
main()
