"""One process is stopped, killed, stuck or fails: all end in time, with the right exit code."""

import signal
import time

import pytest
from runs import read_losses

from jaxtune.parallel.processes import HEARTBEAT_SECONDS

CONFIG = "plain_config"
LONG = "--config.training.steps=100000"


def end_after(run, number, process, steps=6):
    """Sends a signal in the middle of a run; returns the exit code and all output."""
    run.wait_for_steps(steps)
    run.send(number, process)
    return run.finish()


def assert_stopped(output, workdir, processes=1):
    """Finds the step of the last line of the log in a checkpoint and in what processes say."""
    saved = max(int(step.name) for step in (workdir / "checkpoints").glob("[0-9]*"))
    said = f"stopped by SIGTERM after step {saved}, which is saved"
    assert output.count(said) == processes, output
    assert read_losses(workdir)[-1]["step"] == saved


def test_sigterm_saves_and_exits_with_75(start, tmp_path):
    code, output = end_after(start(1, tmp_path / "run", LONG), signal.SIGTERM, None)
    assert code == 75, output
    assert_stopped(output, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_before_the_first_step_ends_all_processes(start, tmp_path, processes):
    run = start(processes, tmp_path / "run", LONG, fault="first")
    while not (tmp_path / "run" / "description.json").exists():  # the last before the first batch
        run.wait_a_moment()
    run.send(signal.SIGTERM, processes - 1)
    begin = time.monotonic()
    code, output = run.finish()
    assert code == 75, output
    assert time.monotonic() - begin < 20  # the bar is 5 on an idle machine
    assert "stopped by SIGTERM, with nothing to save; run the same command again" in output
    assert "Traceback" not in output
    assert not list((tmp_path / "run").glob("checkpoints/[0-9]*"))


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_named(start, tmp_path):
    run = start(2, tmp_path / "process-{process}", LONG)
    code, output = run.finish()
    assert code == 65, output
    assert "process-1: created by process 0 but not visible to another process" in output


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_one_step_and_ends_both(start, tmp_path):
    code, output = end_after(start(2, tmp_path / "run", LONG), signal.SIGTERM, 1)
    assert code == 75, output
    assert_stopped(output, tmp_path / "run", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, process", [(signal.SIGKILL, 0), (signal.SIGSTOP, 1)], ids=["first", "stopped"]
)
def test_all_processes_end_within_the_heartbeat_timeout(start, tmp_path, number, process):
    # A stopped process does not react, however long the launcher waits.
    run = start(2, tmp_path / "run", LONG, grace=60 if number == signal.SIGKILL else 0)
    run.wait_for_steps(6)
    begin = time.monotonic()
    run.send(number, process)
    code, output = run.finish()
    assert code == 75, output
    # Ten times the heartbeat of these runs.
    assert time.monotonic() - begin < HEARTBEAT_SECONDS


@pytest.mark.slow
def test_an_exception_on_one_process_is_not_retried_and_is_reported_by_all(
    start, tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXTUNE_REASON", str(tmp_path / "reason"))
    batch = ("--config.training.batch_size=9", "--config.evaluation.batch_size=9")
    code, output = start(3, tmp_path / "run", LONG, *batch, fault="raise").finish()
    assert code == 65, output
    assert "[1] jaxtune: error: RuntimeError: the fifth batch is cursed" in output
    assert (tmp_path / "reason").read_text() == "65 RuntimeError: the fifth batch is cursed\n"
    for other in (0, 2):
        cause = "process 1 failed: RuntimeError: the fifth batch is cursed"
        assert f"[{other}] jaxtune: error: {cause}" in output


@pytest.mark.slow
def test_a_stuck_process_prints_its_stack_and_ends_all(start, tmp_path):
    code, output = start(
        2, tmp_path / "run", LONG, "--config.training.watchdog_minutes=0.1", fault="sleep"
    ).finish()
    assert code == 75, output
    assert "no step for" in output and "training.watchdog_minutes" in output
    assert 'faulty.py", line' in output  # the stack of the process that sleeps
