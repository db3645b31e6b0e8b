import subprocess
import sys
import time

import pytest

from jaxtune.training.loop.preemption import preempted, watchdog

PROGRAM = """
import time
from jaxtune.training.loop.preemption import watchdog
with watchdog({minutes}) as dog:
    for _ in range(3):
        dog.step()
    {then}
print("ends well")
"""


@pytest.mark.parametrize(
    "minutes, then, code", [(1 / 60, "time.sleep(3600)", 75), (60, "time.sleep(0.5)", 0)]
)
def test_a_run_without_steps_ends_and_shows_where_it_was(minutes, then, code):
    program = PROGRAM.format(minutes=minutes, then=then)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == code
    assert ("ends well" in result.stdout) == (code == 0)
    assert ("training.watchdog_minutes" in result.stderr) == (code == 75)
    assert ('File "<string>", line 7' in result.stderr) == (code == 75)


def test_without_a_limit_nothing_bites():
    with watchdog(0) as dog:
        dog.step()
        time.sleep(0.1)
        dog.step()


def test_a_library_call_listens_to_no_signal():
    assert not preempted(1)
