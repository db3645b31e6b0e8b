"""Logits and generated tokens of DeepSeek-MoE, V2 and V3 equal those of torch in every setting."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import YARN, reference
from oracles import assert_same_logits, load_torch, random_tokens, relative, torch_logits

import jaxtune
from jaxtune.generation.sampling import Sampling
from jaxtune.layers.decoder import ForwardOptions

TOKENS = random_tokens(1, 2, 48)
# Smallest change of the logits by a setting, far above the tolerance, so that ignoring it fails.
SHOWS = 1e-3

V2, V3, MOE = "deepseek_v2", "deepseek_v3", "deepseek"
MSCALES = {
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn-mscales-differ": YARN | {"mscale": 1.4, "mscale_all_dim": 0.707},
    "yarn-all-dim-only": YARN | {"mscale_all_dim": 0.5},
}
SETTINGS = {
    MOE: {
        "plain": {},
        "normalized": {"norm_topk_prob": True},
        "one-normalized": {"norm_topk_prob": True, "num_experts_per_tok": 1},
        "every-second-layer": {"moe_layer_freq": 2, "num_hidden_layers": 4},
        "every-third-from-0": {
            "moe_layer_freq": 3,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 4,
        },
        "one-shared": {"n_shared_experts": 1},
        "no-shared": {"n_shared_experts": None},
        "grouped-heads": {"num_key_value_heads": 2},
        "eps": {"rms_norm_eps": 1e-2},
    },
    V2: {
        "groups": {},
        "greedy": {"topk_method": "greedy", "n_group": None, "topk_group": None},
        "no-q-lora": {"q_lora_rank": None},
        # The family's configs have the key, but transformers does not read it.
        "norm-is-not-read": {"norm_topk_prob": True},
        "scaled": {"routed_scaling_factor": 16.0},
        "eps": {"rms_norm_eps": 1e-2},
        "bias": {"attention_bias": True},
        "bias-no-q-lora": {"attention_bias": True, "q_lora_rank": None},
        "v-wider": {"v_head_dim": 20},
        "no-dense": {"first_k_dense_replace": 0},
        "one-shared": {"n_shared_experts": 1},
        **{name: {"rope_parameters": rope} for name, rope in MSCALES.items()},
    },
    V3: {
        "groups": {},
        "no-groups": {"n_group": 1, "topk_group": 1},
        "no-q-lora": {"q_lora_rank": None},
        "not-normalized": {"norm_topk_prob": False},
        "scaled": {"routed_scaling_factor": 1.0},
        "eps": {"rms_norm_eps": 1e-2},
        "bias": {"attention_bias": True},
        "v-wider": {"v_head_dim": 20},
        "no-dense": {"first_k_dense_replace": 0},
        "all-dense": {"first_k_dense_replace": 3},
        "two-shared": {"n_shared_experts": 2},
        **{name: {"rope_parameters": rope} for name, rope in MSCALES.items()},
    },
}
# Settings of the quick tests; the others are slow tests.
QUICK = {
    (MOE, "one-normalized"),
    (MOE, "every-second-layer"),
    (V2, "groups"),
    (V2, "yarn-mscales-differ"),
    (V3, "no-groups"),
    (V3, "yarn-mscale"),
}
EACH = [
    pytest.param(
        family,
        name,
        marks=[] if (family, name) in QUICK else [pytest.mark.slow],
        id=f"{family}-{name}",
    )
    for family, settings in SETTINGS.items()
    for name in settings
]


def ours(directory):
    return jaxtune.load(directory, dtype="float32", progress=False)


@pytest.mark.parametrize(("family", "setting"), EACH)
def test_logits_are_those_of_torch(family, setting, families):
    directory = families(family, **SETTINGS[family][setting])
    assert_same_logits(ours(directory).logits(TOKENS), torch_logits(reference(directory), TOKENS))


def same_weights(directory, target, **changes):
    """Copies a checkpoint and changes its config only."""
    shutil.copytree(directory, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (MOE, {"norm_topk_prob": True}),
        (V2, {"topk_method": "greedy"}),
        (V2, {"topk_group": 1, "num_experts_per_tok": 2}),
        (V2, {"routed_scaling_factor": 16.0}),
        (V3, {"topk_group": 4}),
        (V3, {"norm_topk_prob": False}),
    ],
)
def test_a_setting_shows_in_the_logits(family, changes, families, tmp_path):
    # Weights are the same, so the setting alone changes the logits, and the test above detects it.
    directory = families(family)
    changed = torch_logits(reference(same_weights(directory, tmp_path / "a", **changes)), TOKENS)
    assert relative(changed, torch_logits(reference(directory), TOKENS)) > SHOWS


@pytest.mark.parametrize("family", [V2, V3])
def test_every_rotary_setting_shows_in_the_logits(family, families, tmp_path):
    directory = families(family)
    seen = {"none": torch_logits(reference(directory), TOKENS)}
    for name, rope in MSCALES.items():
        changed = same_weights(directory, tmp_path / name, rope_parameters=rope)
        logits = torch_logits(reference(changed), TOKENS)
        for other in seen:
            assert relative(logits, seen[other]) > SHOWS, (name, other)
        seen[name] = logits


def test_the_correction_bias_changes_the_choice_and_not_the_weights(families):
    directory = families(V3)
    theirs = reference(directory)
    expected = torch_logits(theirs, TOKENS)
    with torch.no_grad():
        for name, value in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.zero_()
    assert relative(torch_logits(theirs, TOKENS), expected) > SHOWS
    assert_same_logits(ours(directory).logits(TOKENS), expected)


@pytest.mark.parametrize("family", [pytest.param(V2, marks=pytest.mark.slow), V3])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_the_older_style_of_config_is_understood(family, kind, families, tmp_path):
    scaling = {k: v for k, v in MSCALES["yarn-mscales-differ"].items() if k != "rope_theta"}
    scaling[kind] = scaling.pop("rope_type")
    directory = same_weights(
        families(family),
        tmp_path / "old",
        rope_parameters=None,
        rope_theta=1e5,
        rope_scaling=scaling,
    )
    assert_same_logits(ours(directory).logits(TOKENS), torch_logits(load_torch(directory), TOKENS))


PROMPTS = [random_tokens(i, n).tolist() for i, n in enumerate((3, 17, 1, 30, 8))]


def greedy_torch(model, prompt, count):
    """Continues a prompt greedily, without a cache, so that torch's cache is not a factor."""
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            following = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param(MOE, {}, marks=pytest.mark.slow, id=MOE),
        pytest.param(
            V2,
            {"q_lora_rank": None, "rope_parameters": MSCALES["yarn-mscales-differ"]},
            marks=pytest.mark.slow,
            id=V2,
        ),
        pytest.param(V3, {"rope_parameters": MSCALES["yarn-mscale"]}, id=V3),
    ],
)
def test_greedy_tokens_are_those_of_torch(family, changes, families, tmp_path):
    directory = same_weights(families(family, **changes), tmp_path / "endless", eos_token_id=None)
    for path in directory.glob("generation_config.json"):
        path.unlink()
    theirs = reference(directory)
    expected = [greedy_torch(theirs, prompt, 32) for prompt in PROMPTS]
    assert ours(directory).generate_tokens(PROMPTS, 32, Sampling()) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def decode(model, tokens, prefill):
    """Returns the logits [B, T, V] of tokens int[B, T], computed with a cache.

    The first `prefill` tokens are computed together and the others one at a time.
    """
    bound = model.definition.bind(model.base, model.trainable, model.constants)
    options, (batch, length) = ForwardOptions(jnp.float32), tokens.shape
    segments = jnp.ones((batch, length), jnp.int32)

    @jax.jit
    def extend(part, caches, start):
        width = part.shape[1]
        hidden, caches, _ = bound.decoder(
            part,
            segments[:, :width],
            jnp.broadcast_to(start + jnp.arange(width), part.shape),
            options,
            caches=caches,
            kv_segment_ids=segments,
            cache_index=start,
        )
        return bound.head()(hidden), caches

    logits, caches = extend(
        tokens[:, :prefill], bound.decoder.init_cache(batch, length, jnp.float32), 0
    )
    parts = [logits]
    for i in range(prefill, length):
        logits, caches = extend(tokens[:, i : i + 1], caches, i)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("family", [pytest.param(V2, marks=pytest.mark.slow), V3])
@pytest.mark.parametrize("lora", [False, True])
def test_the_absorbed_form_gives_the_logits_of_the_expanded_one(family, lora, families, tmp_path):
    from peft import LoraConfig, get_peft_model

    directory, adapter = families(family, rope_parameters=MSCALES["yarn-mscale"]), None
    theirs = reference(directory)
    if lora:
        adapter = tmp_path / "adapter"
        torch.manual_seed(0)
        settings = LoraConfig(
            r=4, lora_alpha=8, target_modules=["kv_b_proj"], init_lora_weights=False
        )
        plain = torch_logits(theirs, TOKENS)
        theirs = get_peft_model(theirs, settings)
        theirs.save_pretrained(adapter)
        assert relative(torch_logits(theirs, TOKENS), plain) > SHOWS
    model = jaxtune.load(directory, adapter=adapter, dtype="float32", progress=False)
    tokens = jnp.asarray(TOKENS[:, :12])
    expected = torch_logits(theirs, tokens)
    assert_same_logits(model.logits(tokens), expected)
    assert_same_logits(decode(model, tokens, 5), expected)
