"""Faults of one of two processes; all runs continue from the state of another run."""

import signal
import time

import pytest
from disks import small_disk
from forking import Server
from killing import checkpoints, comparable, steps_logged

pytestmark = pytest.mark.slow

STEPS = 24
FLAGS = (
    f"--config.training.steps={STEPS}",
    "--config.checkpoint.every=4",
    "--config.optimizer.schedule=constant",
    "--config.adapter.dropout=0.1",
    "--config.logging.tensorboard=false",
)


@pytest.fixture(scope="module")
def train(server, plain_config, tmp_path_factory):
    """Returns the command line of a run in a directory, without ``--workdir``."""
    source = tmp_path_factory.mktemp("source") / "run"
    first = ("--config.training.steps=2", "--config.optimizer.schedule=constant")
    server.run("train", "--config", plain_config, *first, "--workdir", source)
    return ("train", "--config", plain_config, *FLAGS, f"--config.training.continue_from={source}")


@pytest.fixture(scope="module")
def unbroken(server, train, tmp_path_factory):
    """The log of a run of two processes without a fault."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(server.start_all(2, *train, "--workdir", workdir))
    return comparable(workdir)


def finish(processes, code=0):
    """Waits for the end of processes, checks their exit codes and returns what they print."""
    for process in processes:
        assert process.wait() == code, "\n".join(each.output() for each in processes)
    return [process.output() for process in processes]


def test_kills_of_either_process_lose_nothing(server, train, unbroken, tmp_path):
    workdir = tmp_path / "run"
    resumed = []
    # Process 1 before the first checkpoint, whose state comes from the other run, and process 0
    # after one.
    for victim, steps in ((1, 1), (0, 9)):
        processes = server.start_all(2, *train, "--workdir", workdir)
        victim, other = processes[victim], processes[1 - victim]
        victim.until(lambda: steps_logged(workdir) >= steps)  # noqa: B023
        victim.kill()
        assert other.wait() in (75, -signal.SIGABRT), other.output()
        assert steps_logged(workdir) < STEPS
        resumed.append(max(checkpoints(workdir)[0], default=0))
    first, _ = finish(server.start_all(2, "train", "--workdir", workdir))
    assert f"resuming after step {resumed[-1]}" in first
    assert comparable(workdir) == unbroken


def test_a_stopped_process_ends_the_other_one_with_its_stacks(server, train, unbroken, tmp_path):
    workdir = tmp_path / "run"
    watchdog = "--config.training.watchdog_minutes=0.3"
    # The heartbeat is far longer, so that the watchdog is first on a busy machine as well.
    working, stuck = server.start_all(2, *train, watchdog, "--workdir", workdir, heartbeat=100)
    working.until(lambda: steps_logged(workdir) >= 5)
    begin = time.monotonic()
    stuck.send_signal(signal.SIGSTOP)
    assert working.wait() == 75, working.output()
    assert "no step for" in working.output() and "training.watchdog_minutes" in working.output()
    assert 'trainer.py", line' in working.output()
    assert time.monotonic() - begin < 60
    stuck.kill()  # as a launcher does after its grace period
    finish(server.start_all(2, *train, "--workdir", workdir))
    assert comparable(workdir) == unbroken


def test_a_full_disk_is_one_line_of_each_process_and_the_run_resumes(train, unbroken, tmp_path):
    disk, output = tmp_path / "disk", tmp_path / "output"
    disk.mkdir()
    output.mkdir()
    workdir = disk / "run"
    with Server(output, small_disk(disk, "900k")) as server:
        several = "--config.checkpoint.keep=100"
        outputs = finish(server.start_all(2, *train, several, "--workdir", workdir), 65)
        for output in outputs:
            lines = output.splitlines()
            errors = [line for line in lines if "error" in line.lower()]
            assert "Traceback" not in output and errors[-1] == lines[-1], output
            assert all("no space left" in line.lower() for line in errors), output
            assert errors[-1].startswith("jaxtune: error: ") and len(errors) <= 2, output
            assert str(workdir) in errors[-1]
        larger = {"fault": "enlarged_disk", "environ": {"JAXTUNE_DISK": str(disk)}}
        first, _ = finish(server.start_all(2, "train", "--workdir", workdir, **larger))
        assert "resuming after step" in first
        assert comparable(server.seen(workdir)) == unbroken
