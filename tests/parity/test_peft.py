"""Adapters and merged models have the same logits in PEFT, in both directions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import assert_same_logits, load_torch, random_tokens, relative, torch_logits
from parts import load_parts
from peft import LoraConfig, PeftModel, get_peft_model

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.projections.lora import Lora
from jaxtune.layers.tree import flatten, unflatten

TOKENS = random_tokens(1, 2, 24)

OURS = {
    "attention": ("llama", Lora(4, 6.0)),
    "all-linear": ("qwen2", Lora(4, 8.0, targets=("all-linear",))),
    "some-layers": ("qwen3", Lora(8, 8.0, targets=(r"model\.layers\.[12]\.mlp\.(up|down)_proj",))),
    "one-layer": ("llama", Lora(4, 8.0, targets=("model.layers.1.self_attn.q_proj",))),
    "lm-head": ("llama", Lora(4, 8.0, targets=("lm_head", "q_proj"))),
}
THEIRS = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "regex": {"target_modules": r"model\.layers\.(0|2)\.(self_attn\.[qk]_proj|mlp\.up_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "layers-to-transform": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
    "rank-pattern": {
        "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "gate_proj": 7},
    },
    "alpha-pattern": {
        "target_modules": ["q_proj", "o_proj"],
        "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "o_proj": 11},
    },
    "both-patterns-rslora": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"up_proj": 9, r"model\.layers\.2\.self_attn\.q_proj": 1},
        "alpha_pattern": {"up_proj": 5},
        "use_rslora": True,
    },
    "rslora": {"target_modules": ["k_proj", "o_proj"], "use_rslora": True},
    "lm-head": {"target_modules": ["lm_head", "v_proj"]},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"]},
}


def with_random_factors(parts, seed=0):
    """Replaces all factors, also B, by random values; the padding of lower ranks stays zero."""
    leaves = dict(flatten(parts.trainable))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = {
        path: jax.random.normal(key, value.shape) * 0.2 * _kept(parts.trainable, path)
        for (path, value), key in zip(leaves.items(), keys, strict=True)
    }
    return parts._replace(trainable=unflatten(drawn))


def _kept(trainable, path):
    # The initial A is zero exactly in the rows that pad a lower rank.
    factors = dict(flatten(trainable))
    lora_A = factors[(*path[:-1], "lora_A")]
    rows = jnp.any(lora_A != 0, axis=-1)
    return rows[..., :, None] if path[-1] == "lora_A" else rows[..., None, :]


def peft_adapter(directory, target, *, seed=0, **settings):
    """Makes an adapter with random factors with PEFT; returns the logits of PEFT's model."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings), init_lora_weights=False
    )
    model = get_peft_model(load_torch(directory), config).eval()
    model.save_pretrained(target)
    return torch_logits(model, TOKENS)


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_our_adapter(case, tiny, tmp_path):
    model_type, method = OURS[case]
    directory = tiny(model_type)
    parts = with_random_factors(load_parts(directory, method))
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    write_adapter(tmp_path / "adapter", stored)
    base = load_torch(directory)
    plain = torch_logits(base, TOKENS)
    theirs = torch_logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), TOKENS)
    ours = jaxtune.load(directory, adapter=tmp_path / "adapter", dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), theirs)
    assert relative(theirs, plain) > 1e-2
    # The file has the values that were in memory.
    for path, value in flatten(parts.trainable):
        np.testing.assert_array_equal(dict(flatten(ours.trainable))[path], value)


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_an_adapter_of_peft(case, tiny, tmp_path):
    directory = tiny("llama")
    theirs = peft_adapter(directory, tmp_path / "adapter", **THEIRS[case])
    ours = jaxtune.load(directory, adapter=tmp_path / "adapter", dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), theirs)
    # PEFT reads the same adapter from the files that jaxtune writes.
    method = method_from_peft(read_adapter(tmp_path / "adapter"))
    stored = method.store(ours.definition, ours.trainable, ours.constants)
    write_adapter(tmp_path / "again", stored)
    again = PeftModel.from_pretrained(load_torch(directory), tmp_path / "again").eval()
    assert_same_logits(torch_logits(again, TOKENS), theirs)


def with_other_biases(model):
    """Draws random values for every bias that PEFT trains; returns the logits."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and name.endswith(".bias"):
                value.normal_(std=0.5)
    return torch_logits(model.eval(), TOKENS)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_cross_over_both_ways(bias, tiny, tmp_path):
    directory = tiny("qwen2")  # with biases of the query, key and value projections
    torch.manual_seed(0)
    settings = {"r": 4, "target_modules": ["q_proj", "o_proj"], "bias": bias}
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = get_peft_model(load_torch(directory), config)
    theirs = with_other_biases(model)
    model.save_pretrained(tmp_path / "adapter")
    named = {"biased": tmp_path / "adapter"}
    ours = jaxtune.load(directory, adapters=named, dtype="float32", progress=False)
    plain = np.asarray(ours.logits(TOKENS))
    assert_same_logits(ours.use("biased").logits(TOKENS), theirs)
    method = method_from_peft(stored := read_adapter(tmp_path / "adapter"))
    again = method.store(ours.definition, ours.trainable, ours.constants)
    assert set(again.tensors) == set(stored.tensors) and again.config["bias"] == bias
    write_adapter(tmp_path / "again", again)
    loaded = PeftModel.from_pretrained(load_torch(directory), tmp_path / "again").eval()
    assert_same_logits(torch_logits(loaded, TOKENS), theirs)
    merged = load_torch(ours.save_pretrained(tmp_path / "merged", dtype="float32"))
    assert_same_logits(torch_logits(merged, TOKENS), theirs)
    # The biases of the base are kept.
    np.testing.assert_array_equal(ours.use(None).logits(TOKENS), plain)


def test_biases_that_cannot_be_trained_are_named(tiny, tmp_path):
    with pytest.raises(jaxtune.JaxtuneError, match=r"adapter\.bias=all: there is no bias"):
        load_parts(tiny("llama"), Lora(4, 6.0, bias="all"))
    some = Lora(4, 6.0, targets=("q_proj",), layers=(1,), bias="lora_only")
    with pytest.raises(
        jaxtune.JaxtuneError, match=r"layers\.1\.self_attn\.q_proj\.bias would be trained"
    ):
        load_parts(tiny("qwen2"), some)
    peft_adapter(tiny("llama"), tmp_path / "none", target_modules=["q_proj"], bias="all")
    jaxtune.load(tiny("llama"), adapter=tmp_path / "none", dtype="float32", progress=False)


@pytest.mark.parametrize("case", ["both-patterns-rslora", "lm-head"])
def test_transformers_loads_our_merged_model(case, tiny, tmp_path):
    directory = tiny("llama")
    theirs = peft_adapter(directory, tmp_path / "adapter", **THEIRS[case])
    ours = jaxtune.load(directory, adapter=tmp_path / "adapter", dtype="float32", progress=False)
    merged = load_torch(ours.save_pretrained(tmp_path / "merged", dtype="float32"))
    assert_same_logits(torch_logits(merged, TOKENS), theirs)


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("lora_bias", {"lora_bias": True}),
    ],
)
def test_an_unsupported_setting_is_rejected_by_name(key, settings, tiny, tmp_path):
    directory = tiny("qwen2")
    peft_adapter(directory, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(jaxtune.JaxtuneError, match=f'"{key}"'):
        jaxtune.load(directory, adapter=tmp_path / "adapter", dtype="float32", progress=False)


def test_a_head_of_another_base_model_is_refused(tiny, tmp_path):
    # PEFT stores the frozen weight of an edited head and loads it in place of the base's weight.
    peft_adapter(tiny("llama"), tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(jaxtune.JaxtuneError, match=r"lm_head\.weight"):
        jaxtune.load(tiny("llama", seed=1), adapter=tmp_path / "adapter", progress=False)


def test_an_adapter_of_another_kind_is_refused_by_name(tiny, tmp_path):
    from peft import LoHaConfig

    config = LoHaConfig(task_type="CAUSAL_LM", target_modules=["k_proj"])
    get_peft_model(load_torch(tiny("llama")), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(jaxtune.JaxtuneError, match="LOHA"):
        jaxtune.load(tiny("llama"), adapter=tmp_path / "adapter", progress=False)
