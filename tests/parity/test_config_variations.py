"""Each key of config.json has the same effect as in transformers, or an error names it.

Both programs read the same directory, so transformers defines the meaning of each key.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from families import randomize
from oracles import LOGITS, load_torch, random_tokens, relative, torch_logits
from transformers import AutoConfig, AutoModelForCausalLM

import jaxtune
from jaxtune.errors import JaxtuneError
from jaxtune.models import build_model

DENSE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Ten times the default, so that attention, routing and logits are far from uniform.
    "initializer_range": 0.2,
}
MIXTURE = DENSE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
}
BASES = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE | {"head_dim": 16},
    "deepseek_v2": MIXTURE | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0},
    "deepseek_v3": MIXTURE,
}
TOKENS = random_tokens(1, 2, 40, vocabulary=96)
THETA = {"rope_theta": 1e4}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}


def without_length(rope):
    return {k: v for k, v in rope.items() if k != "original_max_position_embeddings"}


# Model types and changes of config.json that keep the shapes of all weights; ABSENT removes a key.
ABSENT = "absent"
EQUAL = [
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"rope_parameters": without_length(LLAMA3), "original_max_position_embeddings": 16}),
    ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32}),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 2.0}}),
    ("llama", {"rope_parameters": without_length(YARN), "original_max_position_embeddings": 16}),
    ("llama", {"rope_parameters": without_length(YARN)}),
    ("llama", {"rope_parameters": YARN | {"factor": None, "truncate": None, "beta_fast": None}}),
    ("llama", {"rope_parameters": YARN | {"beta_fast": 0, "beta_slow": 0, "mscale": 0}}),
    ("llama", {"rope_parameters": YARN | {"factor": 0.5}}),
    ("llama", {"rope_parameters": YARN, "rope_scaling": YARN}),
    ("llama", {"rope_parameters": ABSENT, "rope_theta": 500.0}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 90.0}, "rope_theta": 7.0}),
    ("llama", {"rms_norm_eps": ABSENT, "hidden_act": ABSENT, "tie_word_embeddings": ABSENT}),
    ("qwen2", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("qwen2", WINDOW | {"max_window_layers": 2}),
    ("qwen2", WINDOW | {"sliding_window": None, "max_window_layers": 0}),
    ("qwen3", WINDOW | {"max_window_layers": 0, "layer_types": ["full_attention"] * 2}),
    ("deepseek_v2", {"routed_scaling_factor": ABSENT, "n_group": 2, "topk_group": 2}),
    ("deepseek_v2", {"topk_method": ABSENT, "n_group": None, "topk_group": None}),
    ("deepseek_v2", {"norm_topk_prob": True, "scoring_func": None, "num_local_experts": 8}),
    ("deepseek_v2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}),
    ("deepseek_v3", {"norm_topk_prob": None}),
    ("deepseek_v3", {"norm_topk_prob": ABSENT, "rope_interleave": ABSENT}),
    ("deepseek_v3", {"rope_interleave": None}),
    ("deepseek_v3", {"rope_interleave": False, "routed_scaling_factor": ABSENT}),
    ("deepseek_v3", {"topk_method": None, "n_group": 2, "topk_group": 1}),
    (
        "deepseek_v3",
        {"n_shared_experts": ABSENT, "rope_parameters": YARN | {"mscale_all_dim": 0.5}},
    ),
]
REFUSED = [
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"rope_parameters": THETA, "rope_scaling": YARN}, "rope_scaling and rope_parameters"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 8.0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": -1.0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor"),
    ("llama", {"rope_parameters": YARN | {"rope_type": None}}, "rope_type null"),
    ("llama", {"rope_parameters": YARN | {"rope_type": ""}}, "rope_type"),
    ("llama", {"rope_parameters": YARN | {"factor": "4"}}, '"factor" is .4., not a positive'),
    ("llama", {"rope_parameters": YARN | {"attention_factor": True}}, "attention_factor"),
    ("llama", {"rope_parameters": None, "rope_theta": "10000"}, "rope_theta"),
    ("llama", {"max_position_embeddings": "64"}, "max_position_embeddings"),
    ("llama", {"pad_token_id": "0"}, "pad_token_id"),
    ("qwen3", {"layer_types": 2}, "layer_types"),
    ("llama", {"tie_word_embeddings": "true"}, "tie_word_embeddings"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ("llama", {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"rope_parameters": {"full_attention": YARN}}, "full_attention"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout"),
    ("qwen2", WINDOW | {"max_window_layers": 1}, "use_sliding_window"),
    ("qwen3", WINDOW | {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("qwen3", {"head_dim": None}, "head_dim"),
    ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
    ("deepseek_v2", {"topk_method": None}, "topk_method"),
    ("deepseek_v2", {"topk_group": 1}, "num_experts_per_tok"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v3", {"n_group": 3}, "n_group"),
    ("deepseek_v3", {"n_group": None}, "n_group"),
    ("deepseek_v3", {"n_group": 8}, "n_group"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group"),
    ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ("deepseek_v3", {"first_k_dense_replace": None}, "first_k_dense_replace"),
    ("deepseek_v3", {"routed_scaling_factor": None}, "routed_scaling_factor"),
    ("deepseek_v3", {"num_local_experts": 4}, "num_local_experts"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Makes a checkpoint of a model type with transformers, once per type."""
    made = {}

    def make(model_type):
        if model_type not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **BASES[model_type])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            randomize(model)
            made[model_type] = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(made[model_type])
        return made[model_type]

    return make


def varied(directory, target, changes):
    """Makes a checkpoint with the same weights and a changed config.json."""
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value != ABSENT}
    target.mkdir()
    (target / "config.json").write_text(json.dumps(kept))
    os.link(directory / "model.safetensors", target / "model.safetensors")
    return target


@pytest.mark.parametrize("model_type", BASES)
def test_a_key_means_what_it_means_to_transformers(base, tmp_path, model_type):
    different = {}
    for index, (kind, changes) in enumerate(EQUAL):
        if kind == model_type:
            directory = varied(base(kind), tmp_path / str(index), changes)
            theirs = torch_logits(load_torch(directory), TOKENS)
            ours = jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS)
            if (worst := relative(ours, theirs)) > LOGITS:
                different[json.dumps(changes)] = worst
    assert not different


def test_unsupported_settings_are_rejected_by_name(base):
    for kind, changes, key in REFUSED:
        config = json.loads((base(kind) / "config.json").read_text())
        build_model(config)
        with pytest.raises(JaxtuneError, match=key) as raised:
            build_model(config | changes)
        assert str(raised.value).startswith("config.json")
        assert "\n" not in str(raised.value)


def test_a_null_survives_an_export(base, tmp_path):
    changes = {"norm_topk_prob": None, "rope_interleave": None}
    directory = varied(base("deepseek_v3"), tmp_path / "model", changes)
    written = jaxtune.load(directory, dtype="float32").save_pretrained(tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (directory, written))
    assert before == after
