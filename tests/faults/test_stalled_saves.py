"""Saves that wait for ever, signals that arrive during one, and checkpoints that are damaged."""

import re
import shutil
import signal
import time

import pytest
from killing import checkpoints, comparable, evaluating, steps_logged

FLAGS = (
    "--config.training.steps=8",
    "--config.checkpoint.every=2",
    "--config.optimizer.schedule=constant",
    "--config.adapter.dropout=0.1",
    "--config.logging.tensorboard=false",
)


@pytest.fixture(scope="module")
def unbroken(server, plain_config, tmp_path_factory):
    """The directory of a run without a fault."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    server.run("train", "--config", plain_config, *FLAGS, "--workdir", workdir)
    return workdir


EXPORT = pytest.param("stalled_export", "write_adapter", marks=pytest.mark.slow)


@pytest.mark.parametrize("fault, function", [("stalled_save", "write_atomically"), EXPORT])
def test_a_stalled_file_system_ends_the_run_with_75_and_it_resumes_bit_for_bit(
    server, plain_config, unbroken, tmp_path, fault, function
):
    workdir = tmp_path / "run"
    train = ("train", "--config", plain_config, *FLAGS, "--workdir", workdir)
    limit = "--config.checkpoint.timeout_minutes=0.2"
    output = server.run(*train, limit, fault=fault, code=75)
    assert f"jaxtune: error: saving step 4 in {workdir / 'checkpoints'} takes more than" in output
    assert "checkpoint.timeout_minutes" in output
    assert function in output  # the stack of the thread that waits
    assert "Traceback" not in output
    output = server.run(*train)
    assert "checkpoint.timeout_minutes: 0.2 → 60.0" in output
    assert comparable(workdir) == comparable(unbroken)


def test_a_run_goes_back_past_damaged_checkpoints_and_ends_as_without(server, unbroken, tmp_path):
    workdir = shutil.copytree(unbroken, tmp_path / "run")
    saved = workdir / "checkpoints"
    shutil.copytree(saved / "8", saved / "10")
    (saved / "10" / "manifest.json").unlink()  # a copy that was interrupted
    (saved / "12").mkdir()
    array = max((saved / "8" / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    output = server.run("train", "--workdir", workdir)
    name = array.relative_to(saved / "8")
    for step, damage in (
        (8, f"{name} is damaged: its SHA-256 differs from the manifest"),
        (10, r"unfinished \(no manifest\)"),
        (12, r"unfinished \(no manifest\)"),
    ):
        assert re.search(rf"warning: checkpoint .*/{step}: {damage}; moved to", output), output
    assert "resuming after step 6" in output
    assert comparable(workdir) == comparable(unbroken)
    assert {path.name for path in (saved / "quarantine").iterdir()} == {"8", "10", "12"}


def test_sigterm_after_the_first_step_waits_until_it_is_evaluated_and_saved(
    server, plain_config, tmp_path
):
    workdir = tmp_path / "run"
    flags = (*FLAGS, "--config.evaluation.every=1")
    process = server.start(
        *("train", "--config", plain_config, *flags, "--workdir", workdir), fault="slow_evaluation"
    )
    process.until(lambda: "evaluating step 1" in process.output())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, process.output()
    assert "stopped by SIGTERM after step 1, which is saved" in process.output()
    assert "nothing to save" not in process.output() and checkpoints(workdir)[0] == {1}


def freeze(process, condition):
    """Stops a process while a condition holds."""
    while True:
        process.until(condition)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)  # all threads of it stop within that time
        if condition():
            return
        process.send_signal(signal.SIGCONT)


MOMENTS = {
    "evaluation": evaluating,
    "save": lambda workdir: bool(checkpoints(workdir)[1]),
}


@pytest.mark.slow
def test_sigterm_during_an_evaluation_or_a_save_loses_nothing(server, plain_config, tmp_path):
    """Each run is unbroken where the other one is stopped."""
    long = ("--config.training.steps=100000", "--config.evaluation.every=9")
    resumed = {}
    for name, condition in MOMENTS.items():
        workdir = tmp_path / name
        train = ("train", "--config", plain_config, *FLAGS, *long, "--workdir", workdir)
        process = server.start(*train)
        freeze(process, lambda: condition(workdir))  # noqa: B023
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 75, process.output()
        saved = max(checkpoints(workdir)[0])
        assert f"stopped by SIGTERM after step {saved}, which is saved" in process.output()
        assert steps_logged(workdir) == saved and not checkpoints(workdir)[1]
        resumed[name] = saved
    steps = max(resumed.values()) + 5
    for name, saved in resumed.items():
        length = f"--config.training.steps={steps}"
        output = server.run("train", "--workdir", tmp_path / name, length)
        assert f"resuming after step {saved}" in output
    first, second = (comparable(tmp_path / name) for name in MOMENTS)
    assert len(first) == steps and first == second
