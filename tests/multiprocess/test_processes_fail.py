"""One process is stopped, killed, stuck or fails: all end in time, with the right exit code."""

import re
import signal
import time

import pytest
from runs import HEARTBEAT, read_losses

# The launcher gives processes that do not react 20 seconds; the rest is for a busy machine.
IN_TIME = HEARTBEAT + 20 + 45
LONG = "--config.training.steps=100000"


def end_after(run, number, process, steps=6):
    """Sends a signal in the middle of a run; returns the code and output, and what it took."""
    run.wait_for_steps(steps)
    begin = time.monotonic()
    run.send(number, process)
    code, output = run.finish()
    return code, output, time.monotonic() - begin


def test_sigterm_saves_and_exits_with_75(start, tmp_path):
    code, output, _ = end_after(start(1, tmp_path / "run", LONG), signal.SIGTERM, None)
    assert code == 75, output
    saved = max(int(step.name) for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert f"stopped by SIGTERM after step {saved}, which is saved" in output
    assert read_losses(tmp_path / "run")[-1]["step"] == saved


@pytest.mark.slow
def test_sigterm_while_the_step_is_compiled_waits_for_its_first_update(start, tmp_path):
    run = start(1, tmp_path / "run", LONG)
    while not (tmp_path / "run" / "description.json").exists():  # the last before compilation
        time.sleep(0.02)
    run.send(signal.SIGTERM)
    code, output = run.finish()
    # The processes agree on one of the first steps after the signal; how many a cached
    # compilation leaves time for is not the point.
    assert code == 75 and re.search(
        r"stopped by SIGTERM after step [1-3], which is saved", output
    ), output


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_named(start, tmp_path):
    run = start(2, tmp_path / "process-{process}", LONG)
    code, output = run.finish()
    assert code == 65, output
    assert "process-1: created by process 0 but not visible to another process" in output


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_one_step_and_ends_both(start, tmp_path):
    code, output, _ = end_after(start(2, tmp_path / "run", LONG), signal.SIGTERM, 1)
    assert code == 75, output
    saved = max(int(step.name) for step in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert output.count(f"stopped by SIGTERM after step {saved}, which is saved") == 2


@pytest.mark.slow
def test_a_killed_worker_ends_the_others_and_the_run_resumes_bit_for_bit(start, tmp_path):
    code, output, seconds = end_after(start(2, tmp_path / "run", fault="pause"), signal.SIGKILL, 1)
    assert code == 75 and seconds < IN_TIME, output
    start(2, tmp_path / "run", resume=True).succeed()
    start(2, tmp_path / "unbroken").succeed()
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, process", [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)], ids=["first", "stopped"]
)
def test_all_processes_end_within_the_heartbeat_timeout(start, tmp_path, number, process):
    code, output, seconds = end_after(start(2, tmp_path / "run", LONG), number, process)
    assert code == 75 and seconds < IN_TIME, output


@pytest.mark.slow
def test_an_exception_on_one_process_is_not_retried_and_is_reported_by_all(start, tmp_path):
    batch = ("--config.training.batch_size=9", "--config.evaluation.batch_size=9")
    code, output = start(3, tmp_path / "run", LONG, *batch, fault="raise").finish()
    assert code == 65, output
    assert "[1] jaxtune: error: RuntimeError: the fifth batch is cursed" in output
    for other in (0, 2):
        cause = "process 1 failed: RuntimeError: the fifth batch is cursed"
        assert f"[{other}] jaxtune: error: {cause}" in output


@pytest.mark.slow
def test_a_stuck_process_prints_its_stack_and_ends_all(start, tmp_path):
    code, output = start(
        2, tmp_path / "run", LONG, "--config.training.watchdog_minutes=0.15", fault="sleep"
    ).finish()
    assert code == 75, output
    assert "no step for" in output and "training.watchdog_minutes" in output
    assert 'faulty.py", line' in output  # the stack of the process that sleeps
