"""Kills and interrupts of runs: early stopping, and what the log tells."""

import json
import signal
import time

import pytest


def lines(workdir, name="metrics.jsonl"):
    path = workdir / name
    return path.read_text().splitlines() if path.exists() else []


def comparable(workdir, name="metrics.jsonl"):
    """Returns the lines without what a clock has measured; ``batch`` is a hash of the data."""
    clocked = ("tokens_per_second", "data_wait")
    entries = [json.loads(line) for line in lines(workdir, name)]
    return [{k: v for k, v in entry.items() if k not in clocked} for entry in entries]


@pytest.mark.slow
def test_a_killed_run_stops_early_where_an_unbroken_one_does(
    plain_config, jaxtune_command, tmp_path, paused
):
    """Patience is counted across the kill: the best score is old by then."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "z9", "completion": "zyx"}) + "\n")
    flags = (
        f"--config.data.eval={held_out}",
        "--config.training.steps=400",
        "--config.checkpoint.every=3",
        "--config.evaluation.every=2",
        "--config.evaluation.stop_patience=6",
    )
    start = ("train", "--config", plain_config, *flags, "--workdir")
    unbroken = jaxtune_command(*start, tmp_path / "unbroken")
    _, error = unbroken.communicate()
    assert "6 evaluations in a row without a better loss" in error
    stopped = json.loads(lines(tmp_path / "unbroken")[-1])["step"]
    workdir = tmp_path / "killed"
    process = jaxtune_command(*start, workdir, steps=stopped - 5)
    while process.poll() is None and not paused.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 0 < len(lines(workdir)) < stopped
    output, error = jaxtune_command("train", "--workdir", workdir).communicate()
    assert f"done: {stopped} steps" in output and "adapter/best" in error
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert comparable(workdir, name) == comparable(tmp_path / "unbroken", name)
    first, second = (
        (path / "adapter" / "best" / "adapter_model.safetensors").read_bytes()
        for path in (workdir, tmp_path / "unbroken")
    )
    assert first == second


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_logs_how_to_resume(plain_config, jaxtune_command, tmp_path):
    workdir = tmp_path / "run"
    process = jaxtune_command(
        "train", "--config", plain_config, "--config.training.steps=100000", "--workdir", workdir
    )
    while process.poll() is None and len(lines(workdir)) < 12:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert f"interrupted; jaxtune train --workdir {workdir} resumes from the checkpoint" in error
    assert "Traceback" not in error
