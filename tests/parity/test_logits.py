"""The logits of every architecture and setting equal those of transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from oracles import assert_same_logits, load_torch, random_tokens, relative, torch_logits

import jaxtune

THETA = {"rope_theta": 1e5}
# Shorter than the texts. Heads are wide, so that every band of a scaling has frequencies.
ORIGINAL = {"original_max_position_embeddings": 32}
WIDE = {"head_dim": 64}
YARN = {"rope_type": "yarn", "factor": 8.0, **THETA, **ORIGINAL}
ROPES = {
    "default": {"rope_type": "default", **THETA},
    "linear": {"rope_type": "linear", "factor": 4.0, **THETA},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        **THETA,
        **ORIGINAL,
    },
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn-attention-factor": YARN | {"attention_factor": 1.3},
    "yarn-betas": YARN | {"beta_fast": 2.0, "beta_slow": 0.5},
    "yarn-untruncated": YARN | {"truncate": False},
}
SETTINGS = {
    **{f"llama-{name}": ("llama", WIDE | {"rope_parameters": r}) for name, r in ROPES.items()},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attention-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-eps": ("llama", {"rms_norm_eps": 1e-2}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-head-dim": ("qwen3", {"head_dim": 32}),
    "qwen3-attention-bias": ("qwen3", {"attention_bias": True}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
}
TOKENS = random_tokens(1, 2, 48)


@pytest.mark.parametrize("setting", SETTINGS)
def test_logits_are_those_of_transformers(setting, tiny):
    model_type, changes = SETTINGS[setting]
    directory = tiny(model_type, **changes)
    ours = jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS)
    assert_same_logits(ours, torch_logits(load_torch(directory), TOKENS))


def test_every_rotary_setting_shows_in_the_logits(tiny):
    # Without a visible change of the logits, the test above would not detect an ignored setting.
    seen = {}
    for name, rope in ROPES.items():
        logits = torch_logits(load_torch(tiny("llama", **WIDE, rope_parameters=rope)), TOKENS)
        for other in seen:
            assert relative(logits, seen[other]) > 1e-3, (name, other)
        seen[name] = logits


def old_style(directory, target, rope_scaling):
    """Copies a checkpoint with rotary settings in the format of older versions of transformers."""
    shutil.copytree(directory, target)
    config = json.loads((target / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 1e5, "rope_scaling": rope_scaling}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "rope_scaling",
    [
        None,
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
        {k: v for k, v in ROPES["llama3"].items() if k != "rope_theta"},
    ],
    ids=["none", "linear", "linear-new-name", "yarn", "llama3"],
)
def test_the_older_style_of_config_is_understood(rope_scaling, tiny, tmp_path):
    directory = old_style(tiny("llama", **WIDE), tmp_path / "old", rope_scaling)
    ours = jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS)
    assert_same_logits(ours, torch_logits(load_torch(directory), TOKENS))


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [("llama", "xla"), ("qwen2", "xla"), ("qwen3", "xla"), ("qwen3", "blockwise")],
)
def test_documents_packed_in_a_row_give_the_logits_of_each_alone(model_type, attention, tiny):
    directory = tiny(model_type)
    theirs = load_torch(directory)
    ours = jaxtune.load(directory, dtype="float32", attention=attention, progress=False)
    # Long enough for two blocks of the blockwise backend, of which the last one is incomplete.
    lengths = (41, 1, 250)
    documents = [random_tokens(i, 1, n) for i, n in enumerate(lengths)]
    padding = np.zeros((1, 5), np.int32)
    tokens = np.concatenate([*documents, padding], axis=1)
    segments = np.repeat([1, 2, 3, 0], [*lengths, 5])[None]
    logits = np.asarray(ours.logits(tokens, segment_ids=segments))
    for i, document in enumerate(documents):
        start = sum(lengths[:i])
        packed = logits[:, start : start + lengths[i]]
        assert_same_logits(packed, torch_logits(theirs, document))


def test_positions_can_be_given(tiny):
    import torch

    directory = tiny("llama", rope_parameters=ROPES["yarn"])
    positions = np.sort(random_tokens(5, 2, 48, vocabulary=120), axis=1)
    ours = jaxtune.load(directory, dtype="float32", progress=False)
    with torch.no_grad():
        theirs = load_torch(directory)(
            torch.as_tensor(TOKENS).long(),
            position_ids=torch.as_tensor(positions).long(),
            attention_mask=torch.ones(TOKENS.shape, dtype=torch.long),
        ).logits.numpy()
    assert_same_logits(ours.logits(TOKENS, positions=positions), theirs)
    assert relative(ours.logits(TOKENS), theirs) > 1e-3


@pytest.mark.slow
def test_logits_of_smollm2_are_those_of_transformers(smollm2, smollm2_gguf):
    tokens = random_tokens(2, 2, 96, vocabulary=49152)
    theirs = torch_logits(load_torch(smollm2), tokens)
    assert_same_logits(
        jaxtune.load(smollm2, dtype="float32", progress=False).logits(tokens), theirs
    )
    straight = jaxtune.load(smollm2_gguf, dtype="float32", progress=False)
    assert_same_logits(straight.logits(tokens), theirs)
