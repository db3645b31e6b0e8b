"""Fixtures of tests that inject faults into real processes."""

import json
import shutil

import pytest
from forking import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts commands of jaxtune; see `Server`."""
    with Server(tmp_path_factory.mktemp("commands")) as server:
        yield server


@pytest.fixture(scope="session")
def plain_config(small_config, tiny_chat, tmp_path_factory):
    """A config file like `small_config`, of prompts and completions and without a chat template.

    A run with a template starts a process for it, which takes as long as the rest of its start.
    """
    directory = tmp_path_factory.mktemp("plain")
    model = shutil.copytree(tiny_chat, directory / "model")
    (model / "chat_template.jinja").unlink()
    rows = [
        {"prompt": f"{letter}{index} as a single letter: ", "completion": letter * (index % 5 + 1)}
        for index, letter in enumerate("abcdefgh" * 5)
    ]
    data, path = directory / "rows.jsonl", directory / "plain.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (
        f"    c.model.path = {str(model)!r}\n"
        f"    c.data.train = c.data.eval = {str(data)!r}\n"
        "    return c\n"
    )
    path.write_text(small_config.read_text().replace("    return c\n", changes))
    return path
