"""LoRA on latent attention and on experts trains as in PEFT, and is stored and merged correctly."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from families import YARN, reference
from oracles import (
    LOSS,
    Recipe,
    assert_same_logits,
    make_examples,
    random_tokens,
    relative,
    torch_logits,
    train_torch,
)
from parts import train_on_eight_devices
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from test_training import GRAD_NORM, LENGTH, assert_same_training, run_config, write_rows

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.parameter_summary import parameter_summary

TOKENS = random_tokens(1, 2, 24)
SHOWS = 1e-3  # a change of the logits beyond any rounding error
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def start(model, target, **settings):
    """Wraps a model in PEFT's LoRA and saves the initial adapter, from which jaxtune starts."""
    torch.manual_seed(0)
    defaults = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**(defaults | settings)))
    model.save_pretrained(target)
    return model


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        pytest.param(
            "deepseek_v3",
            {"rope_parameters": YARN | {"mscale_all_dim": 1.0}},
            {"target_modules": ATTENTION},
            id="v3-attention",
            marks=pytest.mark.slow,
        ),
        # PEFT can adapt experts in this torch model only, because they are separate modules.
        pytest.param(
            "deepseek",
            {},
            {
                "target_modules": ["q_proj", "v_proj", *FEED_FORWARD],
                "rank_pattern": {r"layers\.1\.mlp\.experts\.3\.up_proj": 7},
                "alpha_pattern": {r"layers\.2\.mlp\.experts\.0\.down_proj": 24},
            },
            id="moe-experts",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_lora_trains_as_peft_does(family, changes, settings, families, tmp_path):
    directory, recipe = families(family, **changes), Recipe(accumulation=2)
    examples = make_examples(60, longest=LENGTH)
    config = run_config(
        directory,
        write_rows(tmp_path / "rows.jsonl", examples),
        recipe,
        adapter={"init_from": str(tmp_path / "start")},
    )
    model = start(reference(directory), tmp_path / "start", **settings)
    run = jaxtune.train(config, tmp_path / "run")
    assert_same_training(run.metrics(), train_torch(model, examples, recipe), recipe)
    ours = read_adapter(run.adapter_directory("last")).tensors
    assert {name: value.shape for name, value in ours.items()} == {
        name.replace(".default", ""): tuple(value.shape)
        for name, value in model.named_parameters()
        if value.requires_grad
    }


@pytest.fixture(
    scope="module", params=[pytest.param("deepseek_v2", marks=pytest.mark.slow), "deepseek_v3"]
)
def trained(request, families, tmp_path_factory):
    """Trains LoRA on every projection for 20 steps; returns (checkpoint, run)."""
    directory = families(request.param)
    scratch = tmp_path_factory.mktemp(request.param)
    # Few examples in many passes, so that a random model can learn them.
    rows = write_rows(scratch / "rows.jsonl", make_examples(16, longest=LENGTH))
    targets = "all-linear" if request.param == "deepseek_v3" else [*ATTENTION, *FEED_FORWARD]
    config = run_config(
        directory, rows, Recipe(accumulation=1), adapter={"rank": 4, "targets": targets}
    )
    return directory, jaxtune.train(config, scratch / "run")


def test_the_loss_falls_and_the_summary_names_every_group(trained):
    _, run = trained
    losses = [line["loss"] for line in run.metrics()]
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0]
    rows = [row for row in parameter_summary(run.model("last").definition) if row.kind == "trained"]
    experts, mixtures, layers = 8, 2, 3
    expected = {f"self_attn.{name}": layers for name in ATTENTION}
    for name in FEED_FORWARD:
        expected[f"mlp.{name}"] = layers - mixtures
        expected[f"mlp.shared_experts.{name}"] = mixtures
        expected[f"mlp.experts.{name}"] = mixtures * experts
    assert {row.group: row.modules for row in rows} == expected
    up = next(row for row in rows if row.group == "mlp.experts.up_proj")
    assert up.parameters == mixtures * experts * 4 * (64 + 24)


def test_an_adapter_round_trips_bit_for_bit_with_a_name_for_each_expert(trained, tmp_path):
    directory, run = trained
    saved = run.adapter_directory("last")
    method = method_from_peft(read_adapter(saved))
    model = jaxtune.load(directory, adapter=saved, dtype="float32", progress=False)
    stored = method.store(model.definition, model.trainable, model.constants)
    again = write_adapter(tmp_path / "again", stored)
    before, after = load_file(saved / WEIGHTS), load_file(again / WEIGHTS)
    assert set(before) == set(after)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    prefix = "base_model.model.model.layers.2.mlp.experts"
    names = {f"{prefix}.{e}.{p}.lora_B.weight" for e in range(8) for p in FEED_FORWARD}
    assert names <= set(before)
    assert sum(bool(np.any(before[name])) for name in names) > len(names) / 2


def merged_by_hand(directory, adapter):
    """Returns the torch model with alpha / r · B A added to each weight that the adapter names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors, model = load_file(adapter / WEIGHTS), reference(directory)
    weights = dict(model.named_parameters())
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        lora_A, lora_B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert len(lora_A) == config["rank_pattern"].get(name, config["r"])
        delta = lora_B.astype(np.float64) @ lora_A * config["lora_alpha"] / len(lora_A)
        with torch.no_grad():
            _weight(weights, name).add_(torch.tensor(delta))
    return model


def _weight(weights, name):
    """Returns the weight of a module; transformers stores those of all experts in two arrays."""
    layer, _, expert = name.partition("experts.")
    if layer.endswith("shared_") or not expert:
        return weights[f"{name}.weight"]
    index, projection = expert.split(".")
    if projection == "down_proj":
        return weights[f"{layer}experts.down_proj"][int(index)]
    both = weights[f"{layer}experts.gate_up_proj"][int(index)].chunk(2)
    return both[projection == "up_proj"]


def test_base_and_adapter_are_the_merged_model(trained, tmp_path):
    directory, run = trained
    adapter = run.adapter_directory("last")
    expected = torch_logits(merged_by_hand(directory, adapter), TOKENS)
    assert relative(torch_logits(reference(directory), TOKENS), expected) > SHOWS
    model = jaxtune.load(directory, adapter=adapter, dtype="float32", progress=False)
    assert_same_logits(model.logits(TOKENS), expected)
    merged = model.save_pretrained(tmp_path / "merged")
    assert_same_logits(torch_logits(reference(merged), TOKENS), expected)


def test_one_expert_may_have_a_rank_of_its_own(trained, tmp_path):
    directory, run = trained
    adapter = read_adapter(run.adapter_directory("last"))
    name = "model.layers.2.mlp.experts.5.gate_proj"
    rng = np.random.default_rng(0)
    for factor, shape in (("lora_A", (9, 64)), ("lora_B", (24, 9))):
        key = f"base_model.model.{name}.{factor}.weight"
        adapter.tensors[key] = rng.normal(size=shape).astype(np.float32)
    adapter.config["rank_pattern"] = {name: 9}
    other = write_adapter(tmp_path / "other", adapter)
    expected = torch_logits(merged_by_hand(directory, other), TOKENS)
    before = torch_logits(merged_by_hand(directory, run.adapter_directory("last")), TOKENS)
    assert relative(before, expected) > SHOWS
    model = jaxtune.load(directory, adapter=other, dtype="float32", progress=False)
    assert_same_logits(model.logits(TOKENS), expected)


@pytest.mark.slow
def test_eight_devices_train_as_one_does(families, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(16, longest=LENGTH))
    recipe = Recipe(steps=3, accumulation=1, warmup_steps=1, learning_rate=1e-3)
    config = run_config(families("deepseek_v3"), rows, recipe, adapter={"method": "full"})
    config["training"]["balance_loss"] = 0.01
    expected = jaxtune.train(config, tmp_path / "one").metrics()
    config["mesh"] = {"data": 2, "tensor": 2, "expert": 2}
    train_on_eight_devices({tmp_path / "eight": config})
    ours = jaxtune.Run(tmp_path / "eight").metrics()
    assert len(ours) == len(expected) == 3
    for line, other in zip(ours, expected, strict=True):
        for name in ("loss", "balance_loss", "expert_load_max"):
            assert relative(line[name], other[name]) <= LOSS, line
        assert relative(line["grad_norm"], other["grad_norm"]) <= GRAD_NORM, line
    # A run of eight devices opens on one. AdamW amplifies small differences of gradients, so logits
    # differ more than losses.
    one, eight = (
        np.asarray(jaxtune.Run(tmp_path / run).model("last").logits(TOKENS))
        for run in ("one", "eight")
    )
    assert relative(eight, one) <= GRAD_NORM


def test_a_fully_trained_model_keeps_what_is_never_trained(families, tmp_path):
    directory = families("deepseek_v3")
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(8, longest=LENGTH))
    recipe = Recipe(steps=2, accumulation=1, warmup_steps=0, learning_rate=1e-2)
    config = run_config(directory, rows, recipe, adapter={"method": "full"})
    model = jaxtune.train(config, tmp_path / "run").model("last")
    assert (
        relative(model.logits(TOKENS), jaxtune.load(directory, dtype="float32").logits(TOKENS))
        > SHOWS
    )
    saved = model.save_pretrained(tmp_path / "model")
    before, after = (load_file(place / "model.safetensors") for place in (directory, saved))
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith("e_score_correction_bias")}
    assert_same_logits(model.logits(TOKENS), torch_logits(reference(saved), TOKENS))
