import subprocess
import sys
import time

import pytest

from jaxtune.training.preemption import preempted, watchdog

PROGRAM = """
import time
from jaxtune.training.preemption import watchdog
with watchdog(1 / 60) as dog:
    for _ in range(3):
        dog.step()
        time.sleep(0.2)
    {then}
print("ends well")
"""


@pytest.mark.parametrize("then, code", [("time.sleep(60)", 75), ("pass", 0)])
def test_a_run_without_steps_ends_and_shows_where_it_was(then, code):
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then=then)], capture_output=True, text=True
    )
    assert result.returncode == code
    assert ("ends well" in result.stdout) == (code == 0)
    assert ("training.watchdog_minutes" in result.stderr) == (code == 75)
    assert ('File "<string>", line 8' in result.stderr) == (code == 75)
    assert time.monotonic() - begin < 50


def test_without_a_limit_nothing_bites():
    with watchdog(0) as dog:
        dog.step()
        time.sleep(0.1)
        dog.step()


def test_a_library_call_listens_to_no_signal():
    assert not preempted(1)
