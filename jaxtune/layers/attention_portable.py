"""Attention in plain JAX: backends that run on any device.

B batch, T queries, S keys, H query heads, K key-value heads, D head dimension. Arguments and
results as in `jaxtune.layers.attention.attention`, except that the first `prefix` keys and values
are those of a prefix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Finite, so that rows without any key (padding) give a mean instead of NaN.
MASKED = -1e30
# Queries per block of the blockwise backend.
QUERY_BLOCK = 256


def join_prefix(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """Prepends the keys or values of a prefix [n, K, D] to those of each row x [B, S, K, D]."""
    prefix = jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape))
    return jnp.concatenate([prefix, x], axis=1)


def _mask(
    q_segments: jax.Array, kv_segments: jax.Array, offset: jax.Array | int, prefix: int
) -> jax.Array:
    """Returns bool [B, T, prefix + S]: the prefix, and keys of the segment up to the query."""
    batch, t = q_segments.shape
    rows = offset + jnp.arange(t)
    causal = jnp.arange(kv_segments.shape[1])[None, :] <= rows[:, None]
    mask = causal & (q_segments[:, :, None] == kv_segments[:, None, :])
    if not prefix:
        return mask
    everyone = jnp.broadcast_to((q_segments != 0)[:, :, None], (batch, t, prefix))
    return jnp.concatenate([everyone, mask], axis=2)


def xla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    offset: jax.Array | int,
    scale: float,
    prefix: int = 0,
) -> jax.Array:
    """Plain attention with a [T, S] mask, in float32: for CPUs and for single-token decoding.

    With G = H / K query heads per key-value head, queries [B, T, H, D] are viewed as
    [B, K, G · T, D]: the heads of a group become further queries of their shared keys and values,
    which are therefore not repeated. Scores [B, K, G · T, S] are viewed as [B, K, G, T, S] for the
    mask.
    """
    (batch, t, heads, dim), kv_heads, s = q.shape, k.shape[2], k.shape[1]
    groups = heads // kv_heads
    f32 = jnp.float32
    q_ = q.astype(f32).transpose(0, 2, 1, 3).reshape(batch, kv_heads, groups * t, dim)
    k_ = k.astype(f32).transpose(0, 2, 1, 3)
    v_ = v.astype(f32).transpose(0, 2, 1, 3)
    highest = lax.Precision.HIGHEST if q.dtype == f32 else None
    heads_batch = ((0, 1), (0, 1))
    scores = lax.dot_general(q_ * scale, k_, (((3,), (3,)), heads_batch), highest)
    mask = _mask(q_segments, kv_segments, offset, prefix)[:, None, None]
    scores = jnp.where(mask, scores.reshape(batch, kv_heads, groups, t, s), MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1).reshape(batch, kv_heads, groups * t, s)
    out = lax.dot_general(probabilities, v_, (((3,), (2,)), heads_batch), highest)
    return out.reshape(batch, heads, t, v.shape[-1]).transpose(0, 2, 1, 3).astype(q.dtype)


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    offset: jax.Array | int,
    scale: float,
    prefix: int = 0,
) -> jax.Array:
    """Attention for one block of queries at a time, recomputed in the backward pass.

    Never holds a [T, S] array: for accelerators without a kernel for the shape.
    """
    # The last block is padded with queries of segment 0, whose outputs are cut off.
    batch, t = q_segments.shape
    block = min(QUERY_BLOCK, t)
    pad = -t % block
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_segments = jnp.pad(q_segments, ((0, 0), (0, pad)))

    @jax.checkpoint
    def one_block(start: jax.Array) -> jax.Array:
        q_block = lax.dynamic_slice_in_dim(q, start, block, 1)
        segments = lax.dynamic_slice_in_dim(q_segments, start, block, 1)
        return xla_attention(q_block, k, v, segments, kv_segments, offset + start, scale, prefix)

    out = lax.map(one_block, jnp.arange(0, t + pad, block))
    return jnp.moveaxis(out, 0, 1).reshape(batch, t + pad, *out.shape[3:])[:, :t]
