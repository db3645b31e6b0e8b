"""Updates that are not made: the judgement itself, and a real step under it."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxtune
from jaxtune.errors import JaxtuneError
from jaxtune.runs.metrics import read_lines
from jaxtune.training.bad_steps import (
    APPLIED,
    NOT_FINITE,
    OVERFLOW,
    SPIKE,
    GuardSettings,
    check_step,
    initial_guard,
)

SCALED = GuardSettings(scaling=True)


def judged(settings, pairs):
    """Judges (loss, gradient norm) pairs one after the other; returns outcomes and guards."""
    guard, outcomes, guards = initial_guard(settings), [], []
    for loss, norm in pairs:
        outcome, guard = check_step(guard, jnp.float32(loss), jnp.float32(norm), settings)
        outcomes.append(int(outcome))
        guards.append(guard)
    return outcomes, guards


@pytest.mark.parametrize("bad", [(np.nan, 1.0), (np.inf, 1.0), (1.0, np.nan), (1.0, np.inf)])
def test_what_is_not_finite_is_not_made_and_not_remembered(bad):
    outcomes, guards = judged(GuardSettings(), [(1.0, 1.0), bad, (1.0, 1.0)])
    assert outcomes == [APPLIED, NOT_FINITE, APPLIED]
    assert all(np.isfinite(jax.tree.leaves(guards[-1])))
    assert int(guards[-1].seen) == 2


def test_a_spike_is_known_after_a_window_and_does_not_move_the_mean():
    calm = [(2.0, 0.5)] * 20
    early, _ = judged(GuardSettings(spike_factor=3.0), [*calm[:10], (7.0, 0.5)])
    assert early[-1] == APPLIED
    outcomes, guards = judged(
        GuardSettings(spike_factor=3.0), [*calm, (7.0, 0.5), (2.0, 1.6), (2.0, 1.4)]
    )
    assert outcomes[-3:] == [SPIKE, SPIKE, APPLIED]
    assert float(guards[21].loss) == 2.0 and float(guards[21].grad_norm) == 0.5
    assert judged(GuardSettings(), [*calm, (7.0, 5.0)])[0][-1] == APPLIED


def test_the_loss_scale_moves_as_that_of_torch():
    """A script of overflows and of 2000 sound updates, through torch's own scaler."""
    script = [False, True, True, False] + [True] * 2000 + [False, True]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(1))
    expected = []
    for sound in script:
        parameter.grad = torch.tensor([1.0 if sound else float("inf")])
        scaler.step(optimizer)
        scaler.update()
        expected.append(scaler.get_scale())
    outcomes, guards = judged(SCALED, [(1.0, 1.0 if sound else np.inf) for sound in script])
    assert [float(guard.scale) for guard in guards] == expected
    assert [outcome == APPLIED for outcome in outcomes] == script


def test_an_overflow_that_no_scale_cures_is_a_bad_number():
    outcomes, guards = judged(SCALED, [(1.0, np.inf)] * 18)
    assert outcomes == [OVERFLOW] * 16 + [NOT_FINITE] * 2
    assert float(guards[-1].scale) == 1.0


@pytest.fixture
def rows(tmp_path):
    """Rows of tokens and labels for `tiny`."""
    random = np.random.default_rng(0)
    path = tmp_path / "rows.jsonl"
    examples = [random.integers(3, 160, 24).tolist() for _ in range(16)]
    path.write_text("".join(json.dumps({"input_ids": e, "labels": e}) + "\n" for e in examples))
    return path


def sections(model, rows, **changes):
    base = {
        "model": {"path": str(model)},
        "data": {"train": str(rows), "max_length": 32, "packing": False},
        "adapter": {"rank": 4},
        "training": {"steps": 8, "batch_size": 4, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }
    return base | {name: base.get(name, {}) | values for name, values in changes.items()}


def test_a_run_stops_after_bad_updates_in_a_row_and_its_checkpoints_are_sound(tiny, rows, tmp_path):
    """A clip of nothing and a rate beyond float32 make weights that give no finite loss."""
    config = sections(
        tiny("llama"), rows, optimizer={"learning_rate": 1e30, "schedule": "constant"}
    )
    config["training"] |= {"steps": 30, "max_bad_steps": 3}
    with pytest.raises(
        JaxtuneError, match=r"not finite.*training\.max_bad_steps=3 skipped"
    ) as error:
        jaxtune.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    skipped = [line["step"] for line in lines if "skipped" in line]
    assert len(skipped) == 3 and lines[-1]["step"] == skipped[-1]
    assert all(line["loss"] is None for line in lines if "skipped" in line)


def test_float16_finds_its_scale_and_trains_as_float32_does(tiny, rows, tmp_path):
    runs = {}
    for dtype in ("float16", "float32"):
        # Every step is on all rows: one scale fits them all, and losses can be compared.
        training = {"dtype": dtype, "steps": 25, "batch_size": 16}
        config = sections(tiny("llama"), rows, training=training)
        config["optimizer"]["schedule"] = "constant"
        runs[dtype] = jaxtune.train(config, tmp_path / dtype).metrics()
    scales = [line["loss_scale"] for line in runs["float16"]]
    assert all(later <= earlier for earlier, later in itertools.pairwise(scales))
    skipped = [line["step"] for line in runs["float16"] if "skipped" in line]
    assert skipped == list(range(1, len(skipped) + 1)) and len(skipped) < 12
    assert all(line["skipped"] == "float16 overflow" for line in runs["float16"][: len(skipped)])
    # Values are rounded to 11 bits some tens of times in a row.
    first, last = ([lines[i]["loss"] for lines in runs.values()] for i in (0, -1))
    assert first[0] == pytest.approx(first[1], rel=2e-3)
    assert last[0] < first[0] - 0.1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_resumed_run_judges_as_an_unbroken_one(dtype, tiny, rows, tmp_path):
    """The guard's memory comes back with the checkpoint: scale, means and counts."""
    changes = {"dtype": dtype, "steps": 30, "spike_factor": 1.05, "max_bad_steps": 30}
    config = sections(tiny("llama"), rows, training=changes, optimizer={"learning_rate": 0.05})
    whole = jaxtune.train(config, tmp_path / "whole")
    broken = jaxtune.train(config, tmp_path / "broken")
    checkpoints = tmp_path / "broken" / "checkpoints"
    newest = max(checkpoints.iterdir(), key=lambda path: int(path.name))
    (newest / "manifest.json").unlink()  # as if the last save had never been finished
    jaxtune.train(None, tmp_path / "broken")
    kept = ("step", "loss", "grad_norm", "skipped", "loss_scale")

    def shown(run):
        return [{name: line.get(name) for name in kept} for line in run.metrics()]

    assert shown(jaxtune.Run(broken.path)) == shown(whole)
    skipped = {line.get("skipped") for line in whole.metrics()}
    assert {"float16": "float16 overflow", "float32": "spike"}[dtype] in skipped
