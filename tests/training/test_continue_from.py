"""A new run on other data that continues from the weights and the optimizer state of another."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.errors import JaxtuneError
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.training.continue_from import continued_state

ROWS = [
    {"messages": [{"role": "user", "content": f"{c}{i}"}, {"role": "assistant", "content": c * 3}]}
    for i, c in enumerate("abcdefgh" * 2)
]


def sections(model, **changes):
    """A run that shows the rows in order, two at a time, at a constant rate."""
    base = {
        "model": {"path": str(model)},
        "data": {"max_length": 64, "packing": False, "shuffle": False},
        "adapter": {"rank": 4, "targets": "all-linear"},
        "training": {"steps": 4, "batch_size": 2, "dtype": "float32"},
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "checkpoint": {"every": 3},
        "logging": {"tensorboard": False},
    }
    return base | {name: base.get(name, {}) | values for name, values in changes.items()}


def learned(run):
    return [(line["batch"], line["loss"], line["grad_norm"]) for line in run.metrics()]


METHODS = {
    "lora": {"optimizer": {"learning_rate": 3e-3, "schedule": "constant", "clip_norm": 0.0}},
    "full": {
        "adapter": {"method": "full"},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "name": "lion"},
    },
    "vera": {"adapter": {"method": "vera", "rank": 4}},
    "pissa": {"adapter": {"method": "pissa", "rank": 4}},
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("full", "vera", "pissa")]


@pytest.fixture(scope="module", params=["lora", *SLOW])
def method(request, tiny_chat, tmp_path_factory):
    """Makes the sections of a method, with a run on the first half of the rows and one on all."""
    place = tmp_path_factory.mktemp(request.param)

    def make(**changes):
        config = sections(tiny_chat, **METHODS[request.param])
        return config | {name: config.get(name, {}) | more for name, more in changes.items()}

    first = jaxtune.train(make(), place / "first", train_data=ROWS[:8])
    whole = jaxtune.train(make(training={"steps": 8}), place / "whole", train_data=ROWS)
    return make, first, whole


class Interrupted(jaxtune.Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, event):
        if event.step == self.step:
            raise KeyboardInterrupt


def test_a_continued_run_equals_the_second_half_of_one_run(method, tmp_path):
    make, first, whole = method
    before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    config = make(training={"continue_from": str(first.path)})
    # Interrupted before and after its first checkpoint.
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            jaxtune.train(
                config, tmp_path / "run", train_data=ROWS[8:], callbacks=[Interrupted(step)]
            )
    run = jaxtune.train(config, tmp_path / "run", train_data=ROWS[8:])
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    assert learned(run) == learned(whole)[4:]
    assert run.config.training.continue_from == str(first.path / "checkpoints" / "4")
    assert before == {p: p.stat().st_mtime_ns for p in first.path.rglob("*")}
    # The same command resumes it, however the checkpoint is named.
    for name in ("first/", "first/checkpoints/4", "first/checkpoints/4/"):
        config["training"]["continue_from"] = f"{first.path.parent}/{name}"
        jaxtune.train(config, run.path, train_data=ROWS[8:])
    config["training"]["continue_from"] = str(run.path)
    with pytest.raises(JaxtuneError, match="a run cannot continue from itself"):
        jaxtune.train(config, run.path, train_data=ROWS[8:])
    config["training"]["continue_from"] = f"{first.path}/checkpoints/3"
    with pytest.raises(JaxtuneError, match=r"training\.continue_from: .*4 → .*3; resume"):
        jaxtune.train(config, run.path, train_data=ROWS[8:])
    # Its schedule is its own, and it may start from an earlier checkpoint.
    other = make(
        training={"continue_from": str(first.path / "checkpoints" / "3"), "steps": 2},
        optimizer={"schedule": "linear", "clip_norm": 0.5, "warmup_steps": 1},
    )
    rates = [
        line["learning_rate"]
        for line in jaxtune.train(other, tmp_path / "other", train_data=ROWS[6:]).metrics()
    ]
    assert rates == pytest.approx([0, other["optimizer"]["learning_rate"]])


@pytest.mark.parametrize("method", ["lora"], indirect=True)
def test_a_restore_takes_the_place_of_the_initial_weights_and_moments(
    method, tmp_path, monkeypatch
):
    make, first, _ = method
    restore, deleted = Checkpoints.restore, []

    def watched(setup):
        begin = continued_state(setup)

        def run(initial):
            replaced = jax.tree.leaves([initial.trainable, initial.opt_state])
            arrays = [leaf for leaf in replaced if leaf.ndim]

            def restoring(*arguments):
                deleted.extend(leaf.is_deleted() for leaf in arrays)
                return restore(*arguments)

            monkeypatch.setattr(Checkpoints, "restore", restoring)
            return begin(initial)

        return run

    monkeypatch.setattr("jaxtune.training.train.continued_state", watched)
    config = make(training={"continue_from": str(first.path), "steps": 1})
    jaxtune.train(config, tmp_path, train_data=ROWS[8:])
    assert deleted and all(deleted)


@pytest.mark.parametrize("method", ["lora"], indirect=True)
def test_a_state_that_does_not_fit_is_refused(method, tmp_path):
    make, first, _ = method
    at = str(first.path)
    for changes, message in (
        ({"adapter": {"layers": "0"}}, r"must be as in that run: adapter\.layers:  → 0"),
        ({"optimizer": {"name": "adafactor"}}, r"optimizer\.name: adamw → adafactor"),
        ({"training": {"continue_from": f"{at}/checkpoints/2"}}, r"no such checkpoint \(found: "),
        ({"training": {"continue_from": str(tmp_path)}}, "neither a run .* nor a checkpoint"),
    ):
        config = make(**changes)
        config["training"] = {"continue_from": at} | config["training"]
        with pytest.raises(JaxtuneError, match=message):
            jaxtune.train(config, tmp_path / "run", train_data=ROWS[8:])
        assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vera"], indirect=True)
def test_a_seed_that_constants_depend_on_is_kept(method, tmp_path):
    make, first, _ = method
    config = make(training={"continue_from": str(first.path), "seed": 1})
    with pytest.raises(JaxtuneError, match=r"training\.seed must be as in that run.*: 0 → 1"):
        jaxtune.train(config, tmp_path, train_data=ROWS[8:])


SCRIPT = """
import json, sys
import jaxtune
config, rows, workdir = json.loads(sys.argv[1])
print(json.dumps(jaxtune.train(config, workdir, train_data=rows).metrics()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full"], indirect=True)
def test_a_run_continues_on_another_mesh(method, tmp_path):
    make, first, whole = method
    config = make(training={"continue_from": str(first.path)}, mesh={"data": 1, "fsdp": 2})
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([config, ROWS[8:], str(tmp_path)])],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    losses = [line["loss"] for line in json.loads(done.stdout)]
    expected = [line["loss"] for line in whole.metrics()[4:]]
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora"], indirect=True)
def test_the_template_of_the_run_is_kept(method, tmp_path):
    make, _, _ = method
    template = {"chat_template": "deepseek-llm", "max_length": 64}
    one = {"training": {"steps": 1}}
    first = jaxtune.train(make(data=template, **one), tmp_path / "first", train_data=ROWS[:2])
    config = make(training={"steps": 1, "continue_from": str(first.path)})
    run = jaxtune.train(config, tmp_path / "second", train_data=ROWS[2:4])
    templates = [
        json.loads(each.directory.chat.read_text())["chat_template"] for each in (first, run)
    ]
    assert templates[0] == templates[1]


@pytest.mark.slow
def test_the_experts_of_the_run_are_kept(tiny, tmp_path):
    """The experts that the new rows use most may be others."""
    model = tiny(
        "deepseek_v2",
        num_key_value_heads=4,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    draw = np.random.default_rng(0)
    rows = []
    for first in (3, 80):  # tokens of the first and of the second half of the rows
        drawn = draw.integers(first, first + 70, (8, 12)).tolist()
        rows += [{"input_ids": tokens, "labels": tokens} for tokens in drawn]
    config = sections(model, adapter={"method": "esft", "expert_threshold": 0.3})
    del config["adapter"]["rank"], config["adapter"]["targets"]
    first = jaxtune.train(config, tmp_path / "first", train_data=rows[:8])
    longer = config | {"training": config["training"] | {"steps": 8}}
    whole = jaxtune.train(longer, tmp_path / "whole", train_data=rows)
    scores = [run.directory.expert_scores.read_text() for run in (first, whole)]
    assert scores[0] != scores[1]
    config["training"]["continue_from"] = str(first.path)
    run = jaxtune.train(config, tmp_path / "run", train_data=rows[8:])
    assert run.directory.expert_scores.read_text() == scores[0]
    again = jaxtune.train(longer, first.path, train_data=rows[:8])
    assert len(again.metrics()) == 8 and len(run.metrics()) == 4
