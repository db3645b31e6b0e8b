"""Latent attention caches only latents; absorbed decoding agrees with the expanded form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.layers.context import Context
from jaxtune.layers.mla import MLA, MLASizes
from jaxtune.layers.rope import Rope
from jaxtune.layers.tree import bind, unflatten, variables

SIZES = MLASizes(hidden=24, heads=3, q_lora=9, kv_lora=14, nope=6, rope=4, v=5, scale=0.4)
BATCH, LENGTH = 2, 11
# The same sums in another order, and for bfloat16 other intermediate roundings to 8 bits.
BARS = {jnp.float32: 1e-5, jnp.bfloat16: 0.05}


@pytest.fixture
def mla():
    module = MLA(SIZES)
    found = dict(variables(module))
    keys = jax.random.split(jax.random.key(0), len(found))
    tree = {
        path: jax.random.normal(key, variable.get_value().shape) * 0.4
        for key, (path, variable) in zip(keys, found.items(), strict=True)
    }
    return bind(nnx.graphdef(module), unflatten(tree))


def context(positions, segments, kv_segments, dtype, index=0):
    cos, sin = Rope((1.0, 0.1)).angles(positions)
    return Context(cos, sin, segments, kv_segments, index, None, "xla", dtype)


@pytest.mark.parametrize("dtype", BARS)
def test_absorbed_attention_equals_attention_to_the_keys_of_every_head(mla, dtype):
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, SIZES.hidden)).astype(dtype)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    # The second row begins with padding.
    segments = jnp.ones((BATCH, LENGTH), jnp.int32).at[1, :3].set(0)
    expected, _ = mla(x, context(positions, segments, segments, dtype))
    shapes = mla.cache_shapes(BATCH, LENGTH)
    assert shapes == {"latent": (BATCH, LENGTH, 14), "rope": (BATCH, LENGTH, 4)}
    cache = {name: jnp.zeros((1, *shape), dtype) for name, shape in shapes.items()}
    prefill = 5
    first, cache = mla(
        x[:, :prefill],
        context(positions[:, :prefill], segments[:, :prefill], segments, dtype),
        cache,
    )
    parts = [first]
    for i in range(prefill, LENGTH):
        at = slice(i, i + 1)
        step = context(positions[:, at], segments[:, at], segments, dtype, i)
        part, cache = mla(x[:, at], step, cache)
        parts.append(part)
    ours = np.asarray(jnp.concatenate(parts, axis=1), np.float64)
    expected = np.asarray(expected, np.float64)
    seen = np.asarray(segments) > 0
    error = np.max(np.abs(ours - expected)[seen]) / np.max(np.abs(expected))
    assert error <= BARS[dtype]


def test_a_document_attends_within_itself(mla):
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, SIZES.hidden))
    segments = jnp.asarray([[1] * 4 + [2] * 7])
    positions = jnp.asarray([[*range(4), *range(7)]])
    packed, _ = mla(x, context(positions, segments, segments, jnp.float32))
    alone, _ = mla(
        x[:, 4:],
        context(positions[:, 4:], segments[:, 4:], segments[:, 4:], jnp.float32),
    )
    error = np.max(np.abs(np.asarray(packed[:, 4:] - alone))) / np.max(np.abs(np.asarray(alone)))
    assert error <= BARS[jnp.float32]


def test_without_a_query_latent_there_is_one_projection():
    import dataclasses

    names = {path[0] for path, _ in variables(MLA(dataclasses.replace(SIZES, q_lora=None)))}
    assert "q_proj" in names
    assert not names & {"q_a_proj", "q_a_layernorm", "q_b_proj"}
