"""A run that is killed repeatedly ends like an uninterrupted one."""

import collections
import functools
import itertools
import json
import random
import signal
import time

import pytest

EPOCHS, STEPS = 32, 160  # more than ten kills can use up: 4 × 13 + 6 × 16
# Dropout, noise, shuffling, packing, spikes and the best score all have a state to lose.
FLAGS = (
    f"--config.training.epochs={EPOCHS}",
    "--config.checkpoint.every=7",
    "--config.evaluation.every=9",
    "--config.evaluation.generate=4",
    "--config.adapter.dropout=0.1",
    "--config.training.neftune_alpha=5",
    "--config.training.spike_factor=2",
    "--config.training.accumulation=2",
)


def lines(workdir, name="metrics.jsonl"):
    path = workdir / name
    return path.read_text().splitlines() if path.exists() else []


def comparable(workdir, name="metrics.jsonl"):
    """Returns the lines without what a clock has measured; ``batch`` is a hash of the data."""
    clocked = ("tokens_per_second", "data_wait")
    entries = [json.loads(line) for line in lines(workdir, name)]
    return [{k: v for k, v in entry.items() if k not in clocked} for entry in entries]


def saving(workdir):
    """Returns whether a checkpoint is being written right now."""
    steps = (workdir / "checkpoints").glob("[0-9]*")
    return any(not (step / "manifest.json").exists() for step in steps)


def evaluating(workdir):
    """Returns whether a step is done whose evaluation is not."""
    return len(lines(workdir)) // 9 > len(lines(workdir, "evaluations.jsonl"))


def newest_checkpoint(workdir):
    """Returns the step of the newest complete checkpoint, or 0."""
    complete = (workdir / "checkpoints").glob("[0-9]*/manifest.json")
    return max((int(path.parent.name) for path in complete), default=0)


def kill(start, workdir, moment, chance, paused):
    """Starts a run and kills it when it has made a step and the moment has come.

    Returns whether the moment came. The run cannot end before: it pauses some steps later.
    """
    before = len(lines(workdir))
    # Later starts get further, or the run would never end.
    target, delay = before + chance.randint(3, 9), chance.uniform(0, 0.05)
    last = target + 4 if moment is None else before + 16
    process = start(workdir, steps=last - newest_checkpoint(workdir))
    came = False
    while not came and not paused.exists():
        assert process.poll() is None, process.communicate()[1]
        done = len(lines(workdir))
        came = done >= target if moment is None else done > before and moment(workdir)
        time.sleep(delay if came and moment is None else 0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert before < len(lines(workdir)) <= last < STEPS
    return came


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(
    small_config, jaxtune_command, tmp_path, paused
):
    start = functools.partial(
        jaxtune_command, "train", "--config", small_config, *FLAGS, "--workdir"
    )
    # A cache that is empty, beside one that is warm from the second start on.
    unbroken = start(tmp_path / "unbroken", cache="cold")
    _, error = unbroken.communicate()
    assert unbroken.returncode == 0, error

    workdir, chance = tmp_path / "killed", random.Random(0)
    moments = [None] * 4 + [saving] * 3 + [evaluating] * 3
    chance.shuffle(moments)
    came = {moment for moment in moments if kill(start, workdir, moment, chance, paused)}
    assert came == {None, saving, evaluating}
    finished = jaxtune_command("train", "--workdir", workdir)
    _, error = finished.communicate()
    assert finished.returncode == 0, error
    assert "resuming after step" in error
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert comparable(workdir, name) == comparable(tmp_path / "unbroken", name)
    metrics = comparable(workdir)
    assert len({line["batch"] for line in metrics}) > STEPS // 2
    output, _ = jaxtune_command("data", "order", "--config", small_config, *FLAGS).communicate()
    shown = [json.loads(line)["rows"] for line in output.splitlines()]
    assert collections.Counter(itertools.chain(*shown)) == dict.fromkeys(range(40), EPOCHS)
    assert [line["rows"] for line in metrics] == list(itertools.accumulate(map(len, shown)))
    for name in ("last", "best"):
        files = [path / "adapter" / name for path in (workdir, tmp_path / "unbroken")]
        first, second = ((path / "adapter_model.safetensors").read_bytes() for path in files)
        assert first == second


@pytest.mark.slow
def test_a_killed_run_stops_early_where_an_unbroken_one_does(
    small_config, jaxtune_command, tmp_path, paused
):
    """Patience is counted across the kill: the best score is old by then."""
    held_out = tmp_path / "held_out.jsonl"
    turns = [{"role": "user", "content": "z9"}, {"role": "assistant", "content": "zyx"}]
    held_out.write_text(json.dumps({"messages": turns}) + "\n")
    flags = (
        f"--config.data.eval={held_out}",
        "--config.training.steps=400",
        "--config.checkpoint.every=3",
        "--config.evaluation.every=2",
        "--config.evaluation.stop_patience=6",
    )
    start = ("train", "--config", small_config, *flags, "--workdir")
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
def test_an_interrupted_run_logs_how_to_resume(small_config, jaxtune_command, tmp_path):
    workdir = tmp_path / "run"
    process = jaxtune_command(
        "train", "--config", small_config, "--config.training.steps=100000", "--workdir", workdir
    )
    while process.poll() is None and len(lines(workdir)) < 12:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130
    assert f"interrupted; jaxtune train --workdir {workdir} resumes from the checkpoint" in error
    assert "Traceback" not in error
