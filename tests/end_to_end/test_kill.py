"""A run that is killed again and again ends as one that was not."""

import json
import signal
import time

import pytest

KILLS = (7, 23, 51, 70)  # when metrics.jsonl has this many lines
# Dropout, shuffling and packing all have a state to lose.
FLAGS = (
    "--config.training.steps=90",
    "--config.checkpoint.every=10",
    "--config.evaluation.every=30",
    "--config.adapter.dropout=0.1",
    "--config.training.accumulation=2",
)


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def losses(workdir):
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens")
    return [{name: json.loads(line)[name] for name in kept} for line in lines(workdir)]


@pytest.mark.slow
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(small_config, jaxtune_command, tmp_path):
    start = ("train", "--config", small_config, *FLAGS, "--workdir")
    # A cache that is empty, beside one that is warm from the second start on.
    unbroken = jaxtune_command(*start, tmp_path / "unbroken", cache="cold")
    _, error = unbroken.communicate()
    assert unbroken.returncode == 0, error

    workdir = tmp_path / "killed"
    for count in KILLS:
        process = jaxtune_command(*start, workdir)
        while process.poll() is None and len(lines(workdir)) < count:
            time.sleep(0.002)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert len(lines(workdir)) < 90, "killed too late to show anything"
    finished = jaxtune_command("train", "--workdir", workdir)
    _, error = finished.communicate()
    assert finished.returncode == 0, error
    assert "going on after step" in error
    assert losses(workdir) == losses(tmp_path / "unbroken")
    for name in ("last", "best"):
        files = [path / "adapter" / name for path in (workdir, tmp_path / "unbroken")]
        first, second = ((path / "adapter_model.safetensors").read_bytes() for path in files)
        assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_says_how_to_go_on(small_config, jaxtune_command, tmp_path):
    workdir = tmp_path / "run"
    process = jaxtune_command(
        "train", "--config", small_config, "--config.training.steps=100000", "--workdir", workdir
    )
    while process.poll() is None and len(lines(workdir)) < 12:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert f"interrupted; jaxtune train --workdir {workdir} goes on from the checkpoint" in error
    assert "Traceback" not in error
