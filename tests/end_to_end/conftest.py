"""How tests start jaxtune's command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("command.py")


@pytest.fixture
def paused(tmp_path):
    """The file that a command creates when it has made the steps that it may make."""
    return tmp_path / "paused"


@pytest.fixture
def jaxtune_command(paused):
    """Starts the command line in a process of its own, which pauses after a number of ``steps``."""

    def start(*arguments, steps=None):
        own = {}
        if steps is not None:
            paused.unlink(missing_ok=True)
            own = {"JAXTUNE_STEPS": str(steps), "JAXTUNE_PAUSED": str(paused)}
        return subprocess.Popen(
            [sys.executable, str(COMMAND), *map(str, arguments)],
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
