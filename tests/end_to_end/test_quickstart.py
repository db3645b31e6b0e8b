"""The quickstart: its parts on a tiny model, and the whole of it on the real one."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from jaxtune.cli import main
from jaxtune.config import load_file, resolve
from jaxtune.demos.quickstart import quickstart

ROOT = Path(__file__).parents[2]
FULL = "JAXTUNE_TEST_FULL" in os.environ


def test_quickstart_evaluates_trains_and_evaluates_again(small_config, tmp_path, capsys):
    config = resolve(load_file(small_config), ["training.steps=60"])
    workdir = tmp_path / "quickstart"
    result = quickstart(config, workdir)
    assert result == json.loads((workdir / "result.json").read_text())
    assert result["before"].keys() == result["after"].keys() == {"loss", "exact_match"}
    assert result["before"]["exact_match"] == 0
    assert result["after"]["loss"] < result["before"]["loss"] / 2
    assert 0 < result["seconds"]["train"] < result["seconds"]["total"]
    shown = capsys.readouterr().out
    assert "exact match" in shown and "base model" in shown and "expected answer" in shown
    assert f"jaxtune generate --workdir {workdir}" in shown

    times = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.name != "lock"}
    assert quickstart(config, workdir) == result
    shown = capsys.readouterr().out
    assert "The quickstart has already been run" in shown and f"rm -r {workdir}" in shown
    assert times == {path: path.stat().st_mtime_ns for path in times}


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_it_resumes_after_an_interruption(small_config, jaxtune_command, tmp_path, paused):
    workdir = tmp_path / "quickstart"
    command = ("quickstart", "--config", small_config, "--workdir", workdir)
    process = jaxtune_command(*command, steps=3)
    while process.poll() is None and not paused.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == 130 and "Traceback" not in error
    before = (workdir / "before.json").read_text()
    assert not (workdir / "result.json").exists()

    output, error = jaxtune_command(*command).communicate()
    assert "1/3" not in output and "2/3" in output, error
    assert (workdir / "before.json").read_text() == before
    result = json.loads((workdir / "result.json").read_text())
    assert result["before"]["loss"] == json.loads(before)["loss"]


@pytest.mark.slow
def test_sigterm_saves_a_step(small_config, jaxtune_command, tmp_path):
    workdir = tmp_path / "quickstart"
    options = ("--config.training.steps=100000", "--config.checkpoint.every=0")
    process = jaxtune_command(
        "quickstart", "--config", small_config, "--workdir", workdir, *options
    )
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    saved = max(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    assert f"stopped by SIGTERM after step {saved}, which is saved" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_fully")
@pytest.mark.timeout(3600)
def test_a_real_model_learns_the_task(tmp_path, monkeypatch, capsys):
    """The whole quickstart with ``JAXTUNE_TEST_FULL=1``, as `make test-quickstart` sets it;
    otherwise 10 short steps instead of 40, and 12 of its 210 questions."""
    monkeypatch.chdir(ROOT)
    workdir = tmp_path / "quickstart"
    command = ["quickstart", "--workdir", str(workdir)]
    steps, most_loss, least_exact = 40, 0.5, 0.8
    if not FULL:
        steps, most_loss, least_exact = 10, 0.3, 0.25
        questions = (ROOT / "configs/data/quickstart_eval.jsonl").read_text().splitlines(True)[:12]
        (tmp_path / "eval.jsonl").write_text("".join(questions))
        command += [
            f"--config.data.eval={tmp_path / 'eval.jsonl'}",
            f"--config.training.steps={steps}",
            "--config.data.max_length=128",
            "--config.evaluation.batch_size=12",
            "--config.optimizer.learning_rate=2e-3",
            "--config.optimizer.warmup_steps=1",
        ]
    main(command)
    result = json.loads((workdir / "result.json").read_text())
    with capsys.disabled():
        print(result)
    # The base model gets no record right, and an adapter that learns nothing leaves it so.
    assert result["before"]["exact_match"] < 0.1
    assert result["after"]["exact_match"] >= least_exact
    assert result["after"]["loss"] < most_loss * result["before"]["loss"]
    # Batches are ready when they are asked for, once the first has been made.
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    waits = [line["data_wait"] for line in metrics[1:]]
    assert sum(waits) < 0.01 * result["seconds"]["train"]
    # What the report names is there.
    assert (workdir / "adapter" / "best" / "adapter_model.safetensors").is_file()
    shown = capsys.readouterr().out
    for name in ("adapter/best", "config.json", "metrics.jsonl", "checkpoints", "result.json"):
        assert (workdir / name).exists() and f" {workdir / name}\n" in shown
    assert f"jaxtune generate --workdir {workdir} --prompt" in shown
    assert f"jaxtune export --workdir {workdir} --format merged" in shown
