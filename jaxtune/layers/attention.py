"""Causal attention over packed segments: one interface with several backends.

B batch, T queries, S keys, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtune.errors import JaxtuneError, lookup
from jaxtune.layers.attention_portable import join_prefix
from jaxtune.layers.context import Cache, Context
from jaxtune.layers.linear import Linear
from jaxtune.layers.norm import RMSNorm
from jaxtune.layers.rope import rotate_half
from jaxtune.parallel.rules import constrain
from jaxtune.registry import ATTENTION_BACKENDS

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    name: entry.load() for name, entry in ATTENTION_BACKENDS.items()
}
# Platforms of the kernels; other backends run on any device.
KERNEL_PLATFORMS = {"cudnn": ("gpu", "cuda"), "splash": ("tpu",)}
BY_PLATFORM = {"cpu": "xla", "tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "blockwise"}


def choose_backend(name: str, platform: str, prefix: bool = False) -> str:
    """Returns the backend for a platform when `name` is "auto", else `name` once checked.

    Args:
      name: a name from `BACKENDS`, or "auto".
      platform: "cpu", "gpu" or "tpu".
      prefix: whether there is a prefix of keys and values, which the kernels cannot mask.

    Raises:
      JaxtuneError: an unknown backend, or one that lacks the platform or prefixes.
    """
    if name == "auto":
        chosen = BY_PLATFORM.get(platform, "blockwise")
        if not prefix or chosen not in KERNEL_PLATFORMS:
            return chosen
        logger.info("attention: blockwise instead of %s, which does not support a prefix", chosen)
        return "blockwise"
    lookup(BACKENDS, name, "model.attention")
    if platform not in KERNEL_PLATFORMS.get(name, (platform,)):
        raise JaxtuneError(
            f'model.attention="{name}" runs on {KERNEL_PLATFORMS[name][0]}, not on {platform}; '
            '"auto" chooses a backend of the platform'
        )
    if prefix and name in KERNEL_PLATFORMS:
        raise JaxtuneError(f'model.attention="{name}" does not support a prefix; use "blockwise"')
    return name


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    offset: jax.Array | int = 0,
    scale: float,
    backend: str,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Causal attention in which a query sees only keys of its own segment.

    Args:
      q: [B, T, H, D].
      k: [B, S, K, D] with H a multiple of K.
      v: [B, S, K, Dv].
      q_segments: int[B, T]; 0 is padding.
      kv_segments: int[B, S].
      offset: index of the first query among the keys (0 unless decoding).
      scale: factor on the scores.
      backend: a name from `BACKENDS`; with a prefix "xla" or "blockwise".
      prefix: keys [n, K, D] and values [n, K, Dv] to which all tokens except padding attend.

    Returns:
      [B, T, H, Dv] in the dtype of q. Rows of padding are finite and otherwise undefined.
    """
    if q.shape[1] == 1:
        backend = "xla"  # for a single query the scores are only [1, S]
    joined = {}
    if prefix is not None:
        k, v = join_prefix(prefix[0], k), join_prefix(prefix[1], v)
        joined["prefix"] = prefix[0].shape[0]
    out = BACKENDS[backend](q, k, v, q_segments, kv_segments, offset, scale, **joined)
    # splash names its output itself, with the other residuals of its backward pass.
    return out if backend == "splash" else checkpoint_name(out, "attention")


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention with rotary embeddings."""

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        output_bias: bool = False,
        qk_norm_eps: float | None = None,
    ):
        self.heads, self.kv_heads, self.head_dim = (
            num_attention_heads,
            num_key_value_heads,
            head_dim,
        )
        q_dim, kv_dim = num_attention_heads * head_dim, num_key_value_heads * head_dim
        self.q_proj = Linear(hidden_size, q_dim, axes=("heads", "embed"), bias=bias)
        self.k_proj = Linear(hidden_size, kv_dim, axes=("kv_heads", "embed"), bias=bias)
        self.v_proj = Linear(hidden_size, kv_dim, axes=("kv_heads", "embed"), bias=bias)
        self.o_proj = Linear(q_dim, hidden_size, axes=("embed", "heads"), bias=output_bias)
        with_norm = qk_norm_eps is not None
        self.q_norm = nnx.data(RMSNorm(head_dim, qk_norm_eps) if with_norm else None)
        self.k_norm = nnx.data(RMSNorm(head_dim, qk_norm_eps) if with_norm else None)
        self.prefix: Any = nnx.data(None)

    @property
    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that later tokens attend to, per token: keys and values [K, D]."""
        return dict.fromkeys(("k", "v"), (self.kv_heads, self.head_dim))

    @property
    def token_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the arrays of `token_shapes`."""
        return dict.fromkeys(("k", "v"), ("kv_heads", None))

    @property
    def prefix_width(self) -> int:
        """Values of one prefix token: all of `token_shapes`."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def activation_widths(self) -> dict[str, int]:
        """Values per token of the output ("out") and of queries, keys and values ("qkv")."""
        out = self.heads * self.head_dim
        return {"out": out, "qkv": out + 2 * self.kv_heads * self.head_dim}

    @property
    def flops_per_pair(self) -> int:
        """Operations for each query and key of one product of scores, or of values."""
        return 2 * self.heads * self.head_dim

    def cache_shapes(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one layer's cache, by name: `token_shapes` of every token."""
        return {name: (batch, length, *shape) for name, shape in self.token_shapes.items()}

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, layer: Any = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attends within x [B, T, hidden], and to the cache if there is one.

        Args:
          x: [B, T, hidden].
          context: positions, segments and options of the pass.
          cache: {"k", "v"}: [layers, B, S, K, D] of this layer's blocks; written in place.
          layer: index of the layer in the cache.

        Returns:
          ([B, T, hidden], the updated cache).
        """
        batch, t = x.shape[:2]
        q = self.q_proj(x, context.key_for("q_proj")).reshape(batch, t, self.heads, self.head_dim)
        k = self.k_proj(x, context.key_for("k_proj")).reshape(batch, t, self.kv_heads, -1)
        v = self.v_proj(x, context.key_for("v_proj")).reshape(batch, t, self.kv_heads, -1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate_half(q, context.cos, context.sin)
        k = rotate_half(k, context.cos, context.sin)
        q = constrain(checkpoint_name(q, "q_proj"), "batch", "sequence", "heads", None)
        k = constrain(checkpoint_name(k, "k_proj"), "batch", None, "kv_heads", None)
        v = constrain(checkpoint_name(v, "v_proj"), "batch", None, "kv_heads", None)
        kv_segments, offset = context.segment_ids, 0
        if cache is not None:
            cache = context.write(cache, {"k": k, "v": v}, layer)
            if t == 1:  # prefill (several tokens) starts at index 0 and need not read the cache
                k, v = (context.read(cache, layer)[name] for name in ("k", "v"))
                kv_segments, offset = context.kv_segment_ids, context.cache_index
        out = attention(
            q,
            k,
            v,
            q_segments=context.segment_ids,
            kv_segments=kv_segments,
            offset=offset,
            scale=self.head_dim**-0.5,
            backend=context.backend,
            prefix=self._prefix(context),
        )
        return self.o_proj(out.reshape(batch, t, -1), context.key_for("o_proj")), cache

    def _prefix(self, context: Context) -> tuple[jax.Array, jax.Array] | None:
        """Returns the trained keys and values [n, K, D], which have no rotary embedding."""
        if self.prefix is None:
            return None
        k, v = jnp.split(self.prefix(context.prefix), 2, axis=-1)
        shape = (-1, self.kv_heads, self.head_dim)
        return k.reshape(shape), v.reshape(shape)
