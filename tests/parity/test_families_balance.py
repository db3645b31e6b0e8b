"""The balance loss of each family is that of its paper, with torch's gradient, for every split."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from families import reference
from oracles import LOSS, Recipe, make_examples, relative, summed_loss
from parts import as_batch, load_parts
from test_families_gradients import GRADIENT, torch_gradients
from test_training import keep_gradient, run_config, write_rows

import jaxtune
from jaxtune import JaxtuneError
from jaxtune.adapters.full import Full
from jaxtune.adapters.projections.lora import Lora
from jaxtune.checkpoints.huggingface import checkpoint_tensors
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import flatten, merge
from jaxtune.objectives.sft import sft_loss
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.training.state import initial_state, state_like
from jaxtune.training.step import StepSettings, make_train_step

ROWS = make_examples(4, longest=24, seed=3)
FACTOR = 20.0  # large, so that the balance loss has a visible share of the gradient
EXPERTS, TOP_K, LAYERS = 8, 3, (1, 2)


def routers(model):
    """Records (module, input, output) of every router of a torch model in the returned list."""
    seen = []
    for layer in LAYERS:
        gate = model.model.layers[layer].mlp.gate
        gate.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    return seen


def routing(family, module, x, output):
    """Returns the routing of a layer, from its router's input x [B, T, hidden] and output.

    Returns:
      Scores [B, T, E] that sum to 1; the experts [B, T, k] that the balance loss counts; and the
      experts [B, T, k] that are chosen. V3 chooses with a correction bias and counts without it.
    """
    logits = F.linear(x, module.weight)
    if family == "deepseek_v3":
        scores = logits.sigmoid()
        chosen = output[2].view(*x.shape[:2], -1)
        return scores / scores.sum(-1, keepdim=True), scores.topk(TOP_K).indices, chosen
    scores = logits.softmax(-1)
    chosen = scores.topk(TOP_K).indices if family == "deepseek" else output[2]
    chosen = chosen.view(*x.shape[:2], -1)
    return scores, chosen, chosen


def published(family, seen, rows):
    """Returns the balance loss by the papers' equation, and the load [layers, experts].

    The loss is Σ_i f_i P_i, where f_i is the share of tokens of expert i relative to an even load
    and P_i its mean score, weighted by the number of targets of each sequence and summed over
    sequences and layers.
    """
    total, load = 0.0, np.zeros((len(seen), EXPERTS))
    for layer, (module, x, output) in enumerate(seen):
        scores, counted, chosen = routing(family, module, x, output)
        for i, row in enumerate(rows):
            length = len(row.input_ids)
            times = torch.bincount(counted[i, :length].flatten(), minlength=EXPERTS)
            frequency = times * EXPERTS / (TOP_K * length)
            targets = sum(label != -100 for label in row.labels[1:])
            total = total + targets * (frequency * scores[i, :length].mean(0)).sum()
            load[layer] += np.bincount(chosen[i, :length].flatten(), minlength=EXPERTS)
    return total, load


def one_update(parts, batch, accumulation=1, factor=FACTOR):
    """Returns the metrics and the gradient tree of one optimizer step."""
    mesh, optimizer = single_device_mesh(), keep_gradient()
    like = state_like(parts.definition, optimizer, mesh)
    step = make_train_step(
        parts.definition,
        sft_loss,
        optimizer,
        optax.constant_schedule(1.0),
        ForwardOptions(jnp.float32, "xla", "full"),
        StepSettings(accumulation, 0, False, factor),
        like,
    )
    state = initial_state(jax.tree.map(jnp.copy, parts.trainable), optimizer, like)
    state, metrics = step(state, parts.base, parts.constants, batch)
    return {name: float(value) for name, value in metrics.items()}, state.opt_state


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("deepseek", marks=pytest.mark.slow),
        pytest.param("deepseek_v2", marks=pytest.mark.slow),
        "deepseek_v3",
    ],
)
def test_balance_loss_load_and_gradient_are_those_of_torch(family, families):
    theirs = reference(directory := families(family))
    seen = routers(theirs)
    loss = summed_loss(theirs, ROWS)
    balance, load = published(family, seen, ROWS)
    (loss + FACTOR * balance).backward()
    parts = load_parts(directory, Full())
    metrics, gradient = one_update(parts, as_batch(ROWS, 4, 24, packing=False))
    weight = metrics["targets"]
    # The reported loss does not include the balance loss.
    assert relative(metrics["loss"], loss.item() / weight) <= LOSS
    assert relative(metrics["balance_loss"], balance.item() / weight) <= LOSS
    assert balance.item() / weight > 1.05 * len(LAYERS)  # an even load has 1 per layer
    even = load.sum(1, keepdims=True) / EXPERTS
    assert relative(metrics["expert_load_max"], (load / even).max()) <= LOSS
    assert relative(metrics["expert_load_min"] + 1, (load / even).min() + 1) <= LOSS
    assert metrics["experts_unused"] == (load == 0).sum()
    every = checkpoint_tensors(parts.definition, merge(gradient, parts.base), jnp.float32, {})
    ours = {name: np.asarray(value) * weight for name, value in every}
    expected = torch_gradients(theirs)
    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in LAYERS]
    errors = {name: relative(ours[name], expected[name]) for name in gates}
    assert max(errors.values()) <= LOSS, errors
    errors = {n: relative(ours[n], value) for n, value in expected.items() if np.any(value)}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Full(), id="full", marks=pytest.mark.slow),
        pytest.param(Lora(4, 8.0, targets=("o_proj",)), id="lora"),
    ],
)
def test_the_split_of_the_same_tokens_changes_nothing(method, families):
    parts = load_parts(families("deepseek_v2"), method)
    rows = make_examples(8, longest=24, seed=4)
    unpacked = as_batch(rows, 8, 24, packing=False)
    packed = as_batch(rows, 4, 48, packing=True)
    assert packed["segment_ids"].max() > 1
    metrics, expected = one_update(parts, unpacked)
    plain, without = one_update(parts, unpacked, factor=0.0)
    assert plain["loss"] == metrics["loss"]
    assert "balance_loss" not in plain
    expected = {path: g for path, g in flatten(expected) if np.any(np.asarray(g))}
    without = dict(flatten(without))
    assert any(relative(without[path], g) > 100 * GRADIENT for path, g in expected.items())
    # As in the last batch of a pass, rows are empty: here all rows of two of four micro-batches.
    half_empty = as_batch(rows, 16, 24, packing=False)
    assert not half_empty["segment_ids"][8:].any()
    for other, gradient in (
        one_update(parts, unpacked, 4),
        one_update(parts, packed),
        one_update(parts, half_empty, 4),
    ):
        assert (other["tokens"], other["targets"]) == (metrics["tokens"], metrics["targets"])
        for name in ("loss", "balance_loss", "expert_load_max", "experts_unused"):
            assert relative(other[name] + 1, metrics[name] + 1) <= LOSS, name
        gradient = dict(flatten(gradient))
        for path, value in expected.items():
            assert relative(gradient[path], value) <= GRADIENT, path


@pytest.mark.slow
def test_a_run_balances_the_load_and_records_it(families, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(16, longest=32))
    recipe = Recipe(steps=12, accumulation=2, warmup_steps=0, learning_rate=1e-2)
    finals = {}
    for factor in (0.0, 1.0):
        config = run_config(
            families("deepseek_v2"),
            rows,
            recipe,
            adapter={"method": "full"},
            evaluation={"every": 6},
        )
        config["data"] |= {"eval": str(rows), "overlap": "keep"}
        config["training"]["balance_loss"] = factor
        run = jaxtune.train(config, tmp_path / str(factor))
        finals[factor] = run.evaluations()[-1]
        assert all(("balance_loss" in line) == bool(factor) for line in run.metrics())
        assert all(line["expert_load_max"] > 1 for line in run.metrics())
        table = json.loads((run.path / "expert_load.json").read_text())
        assert table["step"] == 12
        assert list(table["load"]) == [f"model.layers.{layer}.mlp.experts" for layer in LAYERS]
        load = np.array(list(table["load"].values()))
        assert load.shape == (2, EXPERTS)
        np.testing.assert_allclose(load.mean(1), 1, atol=1e-4)
        assert abs(load.max() - finals[factor]["expert_load_max"]) <= 1e-4
    assert finals[1.0]["balance_loss"] < finals[0.0]["balance_loss"] - 0.1
    assert finals[1.0]["expert_load_max"] < finals[0.0]["expert_load_max"]


def test_a_model_without_experts_has_nothing_to_balance(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(8, longest=32))
    config = run_config(tiny("llama"), rows, Recipe(accumulation=1))
    config["training"]["balance_loss"] = 0.001
    with pytest.raises(
        JaxtuneError, match=r"balance_loss=0.001 needs routed experts, and llama has no"
    ):
        jaxtune.train(config, tmp_path / "run")
