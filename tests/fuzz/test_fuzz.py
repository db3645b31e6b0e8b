"""Generated malformed inputs: see `python -m tests.fuzz --help`."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "cases", [100, pytest.param(1000, marks=pytest.mark.slow)], ids=lambda cases: f"{cases} inputs"
)
def test_malformed_inputs_are_one_line_or_accepted(cases):
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(cases), "--cases", str(cases)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    print(done.stdout)
    assert f"seed {cases}: {cases} inputs" in done.stdout


FAULTS = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, "tests/fuzz")
import server
from kinds import Case
from jaxtune.errors import JaxtuneError

root = Path(sys.argv[1])
(root / "in").mkdir()

def raises(error):
    raise error

def lines():
    print("jaxtune: error: a", file=sys.stderr)
    raise JaxtuneError("b")

server.SECONDS = server.PATIENCE = 2
for call in (
    lambda: None,
    lambda: raises(JaxtuneError("no")),
    lambda: raises(KeyError("no")),
    lambda: raises(SystemExit(75)),
    lines,
    os.abort,
    lambda: time.sleep(100),
    lambda: sum(1 for _ in iter(int, 1)),
    lambda: len(b"x" * (2**30 + 2**26)),
    lambda: (root / "x").touch(),
    lambda: Path("marker").touch(),
):
    print(server.run(Case("", call), root / "in", root, root / "marker").verdict)
"""


def test_what_is_not_allowed_is_noticed(tmp_path):
    command = [sys.executable, "-c", FAULTS, str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        *("accepted", "refused", "traceback: KeyError: 'no'", "exit code 75", "2 lines of error"),
        *(
            "exit code -6",
            "more than 2 s",
            "more than 2 s",
            "more than 1024 MiB",
            "wrote x",
            "executed",
        ),
    ], done.stderr
