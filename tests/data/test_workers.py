"""Processes that tokenize end with their parent, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import sys
from transformers import AutoTokenizer
from jaxtune.data import DataSettings, load_examples

if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    load_examples(sys.argv[2], DataSettings(max_length=64), tokenizer=tokenizer, workers=2)
"""


def children(pid):
    """Returns the ids of the processes that a process has started and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
def test_processes_that_tokenize_end_with_a_killed_parent(tiny_chat, tmp_path):
    script, rows = tmp_path / "program.py", tmp_path / "rows.jsonl"
    script.write_text(PROGRAM)
    row = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    rows.write_text(row * 1000)
    command = [sys.executable, str(script), str(tiny_chat), str(rows)]
    parent = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    try:
        while len(workers := children(parent.pid)) < 3:  # two, and multiprocessing's tracker
            assert parent.poll() is None
            time.sleep(0.01)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
