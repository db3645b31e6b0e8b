"""jaxtune's command line, with a fault that JAXTUNE_FAULT names.

``raise``: an exception at the fifth batch of process 1. ``sleep``: process 1 lives on from there
and makes no step. ``first``: every process waits before its first step until a signal has been
sent, which creates the file JAXTUNE_SIGNALLED. ``pause``: it does so before a later step, and five
seconds more for JAX to notice the signal.
It also says how many bytes of the weights each process has read, and puts its number in place of
``{process}`` in its arguments.
"""

import logging
import os
import sys
import time
from pathlib import Path

# As on a machine with jaxtune alone: a third of a process's time would go to importing torch, which
# transformers does where it finds it.
sys.modules["torch"] = None

from jaxtune.cli import main  # noqa: E402
from jaxtune.data.batches import BatchLoader  # noqa: E402
from jaxtune.runs.directory import RunDirectory  # noqa: E402

fault = os.environ.get("JAXTUNE_FAULT", "none")
process = os.environ.get("JAXTUNE_PROCESS", "0")
signalled = os.environ.get("JAXTUNE_SIGNALLED")
chosen = process == "1"
plain, describe = BatchLoader.__next__, RunDirectory.write_description
batches = float("-inf")  # until the description is written


def faulty(self):
    global batches
    batches += 1
    if batches == 5 and chosen and fault == "raise":
        raise RuntimeError("the fifth batch is cursed")
    if batches == 5 and chosen and fault == "sleep":
        time.sleep(600)
    if batches == {"first": 1, "pause": 8}.get(fault):
        while signalled and not Path(signalled).exists():
            time.sleep(0.05)
        time.sleep(5 if fault == "pause" else 0)
    return plain(self)


def described(self, description):
    """Counts batches from here on: those before are summarized by the description."""
    global batches
    describe(self, description)
    batches = 0


sys.argv = [argument.replace("{process}", process) for argument in sys.argv]
logging.getLogger("jaxtune.checkpoints.streaming").setLevel(logging.DEBUG)
BatchLoader.__next__, RunDirectory.write_description = faulty, described
main()
