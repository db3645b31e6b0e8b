"""Small runs through the real command line."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A data set of 40 conversations, each a letter repeated: a tiny model learns it."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = []
    for index in range(40):
        letter = "abcdefgh"[index % 8]
        turns = [
            {"role": "user", "content": f"{letter}{index}"},
            {"role": "assistant", "content": letter * (index % 5 + 1)},
        ]
        rows.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="session")
def small_config(tiny_chat, chats, tmp_path_factory):
    """A config file of a run that takes a few seconds; its steps can be overridden."""
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(
        "from jaxtune import config\n\n"
        "def get_config():\n"
        "    c = config.default()\n"
        f"    c.model.path = {str(tiny_chat)!r}\n"
        f"    c.data.train = c.data.eval = {str(chats)!r}\n"
        "    c.data.overlap = 'keep'\n"
        "    c.data.max_length = 64\n"
        "    c.adapter.rank = 4\n"
        "    c.adapter.targets = ('all-linear',)\n"
        "    c.training.steps = 30\n"
        "    c.training.batch_size = 4\n"
        "    c.training.dtype = 'float32'\n"
        "    c.optimizer.learning_rate = 1e-2\n"
        "    c.checkpoint.every = c.evaluation.every = 10\n"
        "    return c\n"
    )
    return path


@pytest.fixture
def jaxtune_command(tmp_path):
    """Starts the command line in a process of its own, with a compilation cache of its own."""

    def start(*arguments, cache="xla"):
        return subprocess.Popen(
            [sys.executable, "-m", "jaxtune.cli", *map(str, arguments)],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start
