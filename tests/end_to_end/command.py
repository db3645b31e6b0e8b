"""jaxtune's command line, which stops before a step of training if that is asked for.

JAXTUNE_STEPS is a number of steps. When they are made, it creates the file JAXTUNE_PAUSED and waits
for a signal.
"""

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

steps = float(os.environ.get("JAXTUNE_STEPS", "inf"))
plain, describe = BatchLoader.__next__, RunDirectory.write_description
batches = float("-inf")  # until the description is written


def paused(self):
    global batches
    batches += 1
    if batches > steps:
        Path(os.environ["JAXTUNE_PAUSED"]).touch()
        time.sleep(600)
    return plain(self)


def described(self, description):
    """Counts batches from here on: those before are summarized by the description."""
    global batches
    describe(self, description)
    batches = 0


BatchLoader.__next__, RunDirectory.write_description = paused, described
main()
