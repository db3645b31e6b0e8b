"""Parameter counts of the released checkpoints from their config.json, without allocation."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxtune.layers.rope import rope_from_config, yarn_softmax_scale
from jaxtune.models import build_model
from jaxtune.models.definition import Definition

CONFIGS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "configs").glob("*.json"))
}
PAGE = Path(__file__).parents[2] / "docs" / "families.md"

# In billions, as DeepSeek's papers and model cards print them; docs/families.md says which.
TOTAL = {
    "deepseek-llm-7b": "7",
    "deepseek-llm-67b": "67",
    "deepseek-math-7b": "7",
    "deepseek-coder-7b-v1.5": "7",
    "deepseek-coder-1.3b": "1.3",
    "deepseek-coder-5.7bmqa": "5.7",
    "deepseek-coder-6.7b": "6.7",
    "deepseek-coder-33b": "33",
    "deepseek-prover-v2-7b": "7",
    "deepseek-moe-16b": "16.4",
    "deepseek-v2-lite": "15.7",
    "deepseek-coder-v2-lite": "16",
    "deepseek-v2": "236",
    "deepseek-coder-v2": "236",
    "deepseek-v2.5": "236",
    "deepseek-v3": "671",
    "deepseek-v3.1": "671",
    "deepseek-r1": "671",
    "deepseek-prover-v2-671b": "671",
    "deepseek-r1-distill-qwen-1.5b": "1.5",
    "deepseek-r1-distill-qwen-7b": "7",
    "deepseek-r1-distill-qwen-14b": "14",
    "deepseek-r1-distill-qwen-32b": "32",
    "deepseek-r1-distill-llama-8b": "8",
    "deepseek-r1-distill-llama-70b": "70",
    "deepseek-r1-0528-qwen3-8b": "8",
}
ACTIVATED = {
    "deepseek-moe-16b": "2.8",
    "deepseek-v2-lite": "2.4",
    "deepseek-coder-v2-lite": "2.4",
    "deepseek-v2": "21",
    "deepseek-coder-v2": "21",
    "deepseek-v2.5": "21",
    "deepseek-v3": "37",
    "deepseek-v3.1": "37",
    "deepseek-r1": "37",
    "deepseek-prover-v2-671b": "37",
}
# The name is that of the model it was distilled into, whose head is its embedding.
NAMED_WITHOUT_HEAD = {"deepseek-r1-distill-qwen-1.5b"}
# A token reads one row of the embedding; the papers count the matrix for this model alone.
COUNTED_WITH_EMBEDDING = {"deepseek-moe-16b"}


def definition(name):
    return Definition(CONFIGS[name], build_model(CONFIGS[name]), "bfloat16")


def parameters(name):
    """Returns (all, those that a token meets) of a model's parameters."""
    total = activated = 0
    for leaf in definition(name).in_checkpoint().values():
        count, experts = math.prod(leaf.declaration.stacked_shape), leaf.declaration.experts
        total += count
        met = CONFIGS[name]["num_experts_per_tok"] if experts else 1
        activated += count * met // (experts or 1)
    return total, activated


def matrix(name):
    """Returns how many parameters an embedding or a head has."""
    return CONFIGS[name]["vocab_size"] * CONFIGS[name]["hidden_size"]


def assert_published(count, published):
    """A published figure is rounded or cut off at its last digit."""
    unit = 10 ** -len(published.partition(".")[2])
    exact = count / 1e9 / unit
    assert round(float(published) / unit) in (round(exact), math.floor(exact)), (exact, published)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_as_published(name):
    assert_published(parameters(name)[0] - (name in NAMED_WITHOUT_HEAD) * matrix(name), TOTAL[name])


@pytest.mark.parametrize("name", ACTIVATED)
def test_activated_parameters_are_as_published(name):
    left_out = (name not in COUNTED_WITH_EMBEDDING) * matrix(name)
    assert_published(parameters(name)[1] - left_out, ACTIVATED[name])


def test_every_mixture_has_an_activated_count():
    assert set(ACTIVATED) == {name for name in CONFIGS if "n_routed_experts" in CONFIGS[name]}


def without_values(config):
    """Builds transformers' model of a config with shapes alone."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))


# transformers has no DeepSeek-MoE.
IN_TRANSFORMERS = [name for name in CONFIGS if CONFIGS[name]["model_type"] != "deepseek"]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_parameters_and_rotary_embedding_are_those_of_transformers(name):
    config, theirs = CONFIGS[name], without_values(CONFIGS[name])
    # The correction bias of a router is a buffer to torch and a tensor of the checkpoint to us.
    held = [*theirs.named_parameters(), *theirs.named_buffers()]
    counted = sum(v.numel() for k, v in held if not k.endswith("inv_freq"))
    assert parameters(name)[0] == counted

    dim = config.get("qk_rope_head_dim") or config.get("head_dim")
    dim = dim or config["hidden_size"] // config["num_attention_heads"]
    rope = rope_from_config(config, dim)
    rotary = type(theirs.model.rotary_emb)(theirs.config)
    np.testing.assert_allclose(rope.inv_freq, rotary.inv_freq.numpy(), rtol=1e-6)
    assert rope.scale == pytest.approx(rotary.attention_scaling)
    if "kv_lora_rank" in config:
        head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
        scale = head**-0.5 * yarn_softmax_scale(config)
        assert scale == pytest.approx(theirs.model.layers[0].self_attn.scaling)


def table():
    """Returns the rows of the page's table of dimensions by config, each by column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[0] == "config")
    found = {}
    for row in rows[start + 2 :]:
        names = re.findall(r"`([^`]+)`", row[0])
        if len(row) != len(rows[start]) or not names:
            break
        for name in names:
            assert name not in found
            found[name] = dict(zip(rows[start], row, strict=True))
    return found


def test_the_page_agrees_with_the_configs():
    rows = table()
    assert set(rows) == set(CONFIGS)
    columns = {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv heads": "num_key_value_heads",
        "ffn": "intermediate_size",
        "vocabulary": "vocab_size",
    }
    for name, row in rows.items():
        config, (total, activated) = CONFIGS[name], parameters(name)
        assert row["model_type"] == f"`{config['model_type']}`"
        for column, key in columns.items():
            assert int(row[column]) == config[key], (name, column)
        assert row["parameters"] == f"{total:,}", name
        assert row["activated"] == (f"{activated:,}" if name in ACTIVATED else "all"), name
        published = TOTAL[name] + (f" / {ACTIVATED[name]}" if name in ACTIVATED else "")
        assert row["published, 10⁹"] == published, name
