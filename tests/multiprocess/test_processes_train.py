"""Several processes compute the same results as one."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from runs import HERE, LOCAL, read_losses

from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.config import resolve
from jaxtune.runs.directory import RunDirectory

pytestmark = pytest.mark.slow

# Sums over devices come in another order in float32, and the updates before carry it on.
TOLERANCE = 1e-5
GENERATE = "--config.evaluation.generate=4"


def assert_close(ours, theirs):
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "grad_norm"):
        values, expected = ([line[name] for line in lines] for lines in (ours, theirs))
        # A gradient's norm is a root of sums of squares of small differences.
        tolerance = TOLERANCE if name == "loss" else 10 * TOLERANCE
        np.testing.assert_allclose(values, expected, rtol=tolerance)
    for name in ("tokens", "rows", "batch"):
        assert [line[name] for line in ours] == [line[name] for line in theirs]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """A run of one process with one device; the last batch of each pass is half empty."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    output = start(1, workdir, GENERATE).succeed()
    assert "training for 12 steps: 4 passes over 40 rows" in output
    assert [line["rows"] for line in read_losses(workdir)][2::3] == [40, 80, 120, 160]
    return workdir


def test_two_processes_of_two_devices(start, alone, tmp_path):
    start(2, tmp_path / "run", "--config.mesh.fsdp=2", GENERATE, devices=2).succeed()
    assert_close(read_losses(tmp_path / "run"), read_losses(alone))
    answers, expected = ((path / "samples.jsonl").read_text() for path in (tmp_path / "run", alone))
    assert answers == expected and answers.count("\n") >= 4
    kept = ("evaluations.jsonl", "adapter/last/adapter_config.json", "description.json")
    assert all((tmp_path / "run" / name).is_file() for name in kept)


def test_each_of_four_processes_reads_its_shards_alone(start, alone, tmp_path, tiny_chat):
    output = start(4, tmp_path / "run", "--config.mesh.data=1", "--config.mesh.fsdp=4").succeed()
    assert_close(read_losses(tmp_path / "run"), read_losses(alone))
    read = {int(p): int(n) for p, n in re.findall(r"process (\d): (\d+) bytes of weights", output)}
    # Four bytes a parameter: norms are whole everywhere, all else is a quarter.
    hidden, layers = 64, 3
    norms = 4 * hidden * (2 * layers + 1)
    weights = (tiny_chat / "model.safetensors").stat().st_size
    assert sorted(read) == [0, 1, 2, 3]
    for count in read.values():
        assert abs(count - (norms + (weights - norms) / 4)) < 0.02 * weights


def test_callbacks_run_in_every_process_and_the_first_one_stops_all(tiny_chat, chats, tmp_path):
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    config = {
        "model": {"path": str(tiny_chat)},
        "data": {"max_length": 64},
        "training": {"steps": 14, "batch_size": 4, "dtype": "float32"},
        "checkpoint": {"every": 20},
        "logging": {"tensorboard": False},
    }
    arguments = json.dumps([config, rows, str(tmp_path / "run"), str(tmp_path / "events")])
    launcher = [sys.executable, str(LOCAL), "--processes", "2", "--"]
    subprocess.run(
        [*launcher, sys.executable, str(HERE / "callbacks.py"), arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        check=True,
    )
    first, second = (json.loads((tmp_path / f"events-{n}.json").read_text()) for n in (0, 1))
    assert first == second
    assert [step for kind, step, _ in first if kind == "step"] == list(range(1, 11))
    assert [(kind, step) for kind, step, _ in first[-2:]] == [("checkpoint", 10), ("end", 10)]
    assert [line["loss"] for line in read_losses(tmp_path / "run")] == [
        loss for kind, _, loss in first if kind == "step"
    ]


def test_late_processes_continue_from_the_checkpoint_that_the_first_one_has_chosen(tmp_path):
    source = RunDirectory(tmp_path / "source")
    (source.checkpoints / "10").mkdir(parents=True)
    (source.checkpoints / "10" / "manifest.json").write_text("{}")
    source.config.write_text(resolve({}).to_json())
    scores = ExpertScores({1: [0.5, 0.5]}, {1: [0.75, 0.25]})
    source.write_expert_scores(scores)
    launcher = [sys.executable, str(LOCAL), "--processes", "2", "--grace", "5", "--"]
    arguments = [source.path, tmp_path / "run", tmp_path / "result"]
    subprocess.run(
        [*launcher, sys.executable, str(HERE / "late.py"), *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        check=True,
    )
    for process in (0, 1):
        result = json.loads((tmp_path / f"result-{process}.json").read_text())
        assert result == ["20", scores.to_json()]
