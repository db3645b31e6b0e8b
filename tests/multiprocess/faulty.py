"""jaxtune's command line, with a fault that JAXTUNE_FAULT names.

``raise``: an exception at the fifth batch of process 1. ``sleep``: process 1 lives on from there
and makes no step. ``pause``: every process waits before its eighth batch, for others to act.
It also says how many bytes of the weights each process has read, and puts its number in place of
``{process}`` in its arguments.
"""

import logging
import os
import sys
import time

# As on a machine with jaxtune alone: a third of a process's time would go to importing torch, which
# transformers does where it finds it.
sys.modules["torch"] = None

from jaxtune.cli import main  # noqa: E402
from jaxtune.data.batches import BatchLoader  # noqa: E402

fault = os.environ.get("JAXTUNE_FAULT", "none")
process = os.environ.get("JAXTUNE_PROCESS", "0")
chosen = process == "1"
plain = BatchLoader.__next__
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


sys.argv = [argument.replace("{process}", process) for argument in sys.argv]
logging.getLogger("jaxtune.checkpoints.streaming").setLevel(logging.DEBUG)
BatchLoader.__next__ = faulty
main()
