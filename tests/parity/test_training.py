"""Loss, learning rate and gradient norm of every step equal those of PEFT or plain torch."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from oracles import LOSS, Recipe, load_torch, make_examples, relative, train_torch
from parts import as_batch, load_parts, train_on_eight_devices
from peft import LoraConfig, get_peft_model

import jaxtune
from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapters.full import Full
from jaxtune.adapters.projections.lora import Lora
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import flatten
from jaxtune.objectives.sft import sft_loss
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.training.state import initial_state, state_like
from jaxtune.training.step import StepSettings, make_train_step

# A norm sums the squares of gradients, whose errors are larger than those of losses.
GRAD_NORM = 1e-4
# Relative to the peak: jaxtune computes schedules in float32, torch in float64.
RATE = 1e-6
# For trained factors: AdamW divides by the root of the second moment, so the relative error of a
# small gradient counts as much as that of a large one.
FACTORS = 1e-3
LENGTH = 32


def write_rows(path, examples):
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in examples))
    return path


def run_config(model, rows, recipe, **sections):
    """Returns a recipe as a config: float32, one example per row, in the order of the file."""
    tree = {
        "model": {"path": str(model)},
        "data": {"train": str(rows), "max_length": LENGTH, "packing": False, "shuffle": False},
        "training": {
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "accumulation": recipe.accumulation,
            "dtype": "float32",
        },
        "optimizer": {
            "learning_rate": recipe.learning_rate,
            "warmup_steps": recipe.warmup_steps,
            "weight_decay": recipe.weight_decay,
            "clip_norm": recipe.clip_norm,
        },
        "logging": {"tensorboard": False},
        "checkpoint": {"every": 0},
    }
    return tree | {name: tree.get(name, {}) | values for name, values in sections.items()}


def assert_same_training(metrics, updates, recipe):
    """Asserts that all steps agree, and that clipping, schedule and training have an effect."""
    assert [line["step"] for line in metrics] == list(range(1, recipe.steps + 1))
    for line, update in zip(metrics, updates, strict=True):
        assert relative(line["loss"], update.loss) <= LOSS, line
        assert relative(line["grad_norm"], update.grad_norm) <= GRAD_NORM, line
        rate_error = abs(line["learning_rate"] - update.learning_rate)
        assert rate_error <= RATE * recipe.learning_rate, line
    assert min(update.grad_norm for update in updates) > recipe.clip_norm
    assert len({update.learning_rate for update in updates}) > recipe.steps // 2
    assert abs(updates[-1].loss - updates[0].loss) > 100 * LOSS * updates[0].loss


def peft_model(directory, target, **settings):
    """Returns an untrained PEFT model; saves its adapter to `target`, from which jaxtune starts."""
    torch.manual_seed(0)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_torch(directory), LoraConfig(**(defaults | settings)))
    model.save_pretrained(target)
    return model


def test_lora_trains_as_peft_does(tiny, tmp_path):
    directory, recipe = tiny("llama"), Recipe()
    examples = make_examples(60, longest=LENGTH)
    config = run_config(
        directory,
        write_rows(tmp_path / "rows.jsonl", examples),
        recipe,
        adapter={"init_from": str(tmp_path / "start")},
    )
    model = peft_model(directory, tmp_path / "start", target_modules="all-linear")
    run = jaxtune.train(config, tmp_path / "run")
    assert_same_training(run.metrics(), train_torch(model, examples, recipe), recipe)
    trained = {
        name.replace(".default", ""): value.detach().numpy()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    ours = read_adapter(run.adapter_directory("last")).tensors
    assert set(ours) == set(trained)
    errors = {name: relative(ours[name], value) for name, value in trained.items()}
    assert max(errors.values()) <= FACTORS, errors


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_as_those_of_peft_do(bias, tiny, tmp_path):
    directory, recipe = tiny("qwen2"), Recipe()
    examples = make_examples(60, longest=LENGTH)
    rows = write_rows(tmp_path / "rows.jsonl", examples)
    start = {"init_from": str(tmp_path / "start")}
    config = run_config(directory, rows, recipe, adapter=start)
    settings = {"target_modules": ["q_proj", "up_proj"], "bias": bias}
    model = peft_model(directory, tmp_path / "start", **settings)
    run = jaxtune.train(config, tmp_path / "run")
    assert_same_training(run.metrics(), train_torch(model, examples, recipe), recipe)
    trained = {n: v for n, v in model.named_parameters() if v.requires_grad and "bias" in n}
    ours = read_adapter(run.adapter_directory("last")).tensors
    errors = {n: relative(ours[n], v.detach().numpy()) for n, v in trained.items()}
    assert len(errors) == (9 if bias == "all" else 3) and max(errors.values()) <= FACTORS, errors


@pytest.mark.parametrize("model_type", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_full_fine_tuning_trains_as_torch_does(model_type, tiny, tmp_path):
    directory, recipe = tiny(model_type), Recipe(learning_rate=1e-3)
    examples = make_examples(60, longest=LENGTH)
    config = run_config(
        directory,
        write_rows(tmp_path / "rows.jsonl", examples),
        recipe,
        adapter={"method": "full"},
    )
    run = jaxtune.train(config, tmp_path / "run")
    assert_same_training(
        run.metrics(), train_torch(load_torch(directory), examples, recipe), recipe
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)  # two minutes of two idle cores, but they may be shared
def test_lora_on_smollm2_trains_as_peft_does(smollm2, tmp_path):
    recipe = Recipe(batch_size=4, accumulation=2, learning_rate=1e-3)
    examples = make_examples(30, longest=64, shortest=16, vocabulary=49152)
    config = run_config(
        smollm2,
        write_rows(tmp_path / "rows.jsonl", examples),
        recipe,
        adapter={"init_from": str(tmp_path / "start")},
        data={"max_length": 64},
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = peft_model(smollm2, tmp_path / "start", r=8, lora_alpha=16, target_modules=targets)
    run = jaxtune.train(config, tmp_path / "run")
    assert_same_training(run.metrics(), train_torch(model, examples, recipe), recipe)


def keep_gradient():
    """Returns an optimizer that changes no weights and whose state is the last gradient."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(updates, state, params=None):
        del state, params
        return init(updates), updates

    return optax.GradientTransformation(init, update)


def one_update(parts, batch, accumulation):
    """Returns the loss and the gradient by path of one optimizer step."""
    mesh, optimizer = single_device_mesh(), keep_gradient()
    like = state_like(parts.definition, optimizer, mesh)
    step = make_train_step(
        parts.definition,
        sft_loss,
        optimizer,
        optax.constant_schedule(1.0),
        ForwardOptions(jnp.float32, "xla", "full"),
        StepSettings(accumulation, 0, False),
        like,
    )
    trainable = jax.tree.map(jnp.copy, parts.trainable)  # the step donates its state
    state = initial_state(trainable, optimizer, like)
    state, metrics = step(state, parts.base, parts.constants, batch)
    return float(metrics["loss"]), dict(flatten(state.opt_state))


@pytest.mark.parametrize("method", [Full(), Lora(4, 8.0)], ids=["full", "lora"])
def test_the_split_of_the_same_tokens_changes_nothing(method, tiny):
    parts = load_parts(tiny("llama"), method)
    rows = make_examples(8, longest=LENGTH, seed=4)
    unpacked = as_batch(rows, 8, LENGTH, packing=False)
    packed = as_batch(rows, 4, 2 * LENGTH, packing=True)
    assert packed["segment_ids"].max() > 1
    loss, expected = one_update(parts, unpacked, 1)
    others = {
        "4 accumulated": one_update(parts, unpacked, 4),
        "packed": one_update(parts, packed, 1),
        "packed, 4 accumulated": one_update(parts, packed, 4),
    }
    moved = [path for path, value in expected.items() if np.any(np.asarray(value))]
    assert moved
    for name, (other_loss, gradient) in others.items():
        assert relative(other_loss, loss) <= LOSS, name
        for path in moved:
            assert relative(gradient[path], expected[path]) <= LOSS, (name, path)


def test_dropout_is_repeatable_and_differs_between_steps(tiny, tmp_path):
    directory = tiny("llama")
    # With a learning rate of 0, steps differ by their dropout masks only.
    recipe = Recipe(steps=4, warmup_steps=0, learning_rate=0.0)
    examples = make_examples(8, longest=LENGTH)
    rows = write_rows(tmp_path / "rows.jsonl", examples)
    settings = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    peft_model(directory, tmp_path / "start", lora_dropout=0.3, **settings)
    sections = {
        # Dropout is taken from the config rather than from the adapter.
        "adapter": {"init_from": str(tmp_path / "start"), "dropout": 0.3},
        "evaluation": {"every": 2},
    }
    config = run_config(directory, rows, recipe, **sections)
    config["data"] |= {"eval": str(rows), "overlap": "keep"}
    runs = [jaxtune.train(config, tmp_path / name) for name in ("first", "second")]
    losses = [[line["loss"] for line in run.metrics()] for run in runs]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == recipe.steps
    undropped = peft_model(directory, tmp_path / "plain", lora_dropout=0.0, **settings)
    expected = train_torch(undropped, examples, recipe)[0].loss
    assert all(relative(loss, expected) > 100 * LOSS for loss in losses[0])
    for run in runs:
        assert [relative(line["loss"], expected) <= LOSS for line in run.evaluations()] == [
            True
        ] * 2
    config["training"]["seed"] = 1
    other = [line["loss"] for line in jaxtune.train(config, tmp_path / "other").metrics()]
    assert not set(other) & set(losses[0])


@pytest.mark.slow
def test_the_configured_dropout_takes_effect_once_b_is_not_zero(tiny, tmp_path):
    recipe = Recipe(steps=3, warmup_steps=0)
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(8, longest=LENGTH))
    losses = {}
    for dropout in (0.0, 0.5):
        config = run_config(tiny("llama"), rows, recipe, adapter={"rank": 4, "dropout": dropout})
        run = jaxtune.train(config, tmp_path / str(dropout))
        losses[dropout] = [line["loss"] for line in run.metrics()]
    assert relative(losses[0.5][0], losses[0.0][0]) <= LOSS
    assert all(relative(losses[0.5][i], losses[0.0][i]) > 100 * LOSS for i in (1, 2))


METHODS = ("lora", "full")
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "data-fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data-fsdp-sequence": {"data": 2, "fsdp": 2, "sequence": 2},
}


@pytest.fixture(scope="module")
def metrics(tiny, tmp_path_factory):
    """Trains every method on every mesh; returns a function from method and mesh to metrics."""
    scratch = tmp_path_factory.mktemp("meshes")
    rows = write_rows(scratch / "rows.jsonl", make_examples(40, longest=LENGTH))

    def config(method, mesh):
        recipe = Recipe(steps=5, batch_size=16, accumulation=2, warmup_steps=1)
        sections = {"adapter": {"method": method, "rank": 4, "targets": "all-linear"}, "mesh": mesh}
        return run_config(tiny("qwen3"), rows, recipe, **sections)

    for method in METHODS:
        jaxtune.train(config(method, {}), scratch / f"{method}-alone")
    train_on_eight_devices(
        {scratch / f"{m}-{name}": config(m, mesh) for m in METHODS for name, mesh in MESHES.items()}
    )
    return lambda method, mesh: jaxtune.Run(scratch / f"{method}-{mesh}").metrics()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_as_one_does(mesh, method, metrics):
    ours, expected = metrics(method, mesh), metrics(method, "alone")
    assert len(ours) == len(expected) == 5
    for line, other in zip(ours, expected, strict=True):
        assert relative(line["loss"], other["loss"]) <= LOSS, line
        assert relative(line["grad_norm"], other["grad_norm"]) <= GRAD_NORM, line
