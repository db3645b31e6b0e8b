"""Multi-head latent attention: keys and values are projected from one small latent per token.

A token's latent c [R] and its rotary key k_r, which all heads share, determine its keys and values.
A head has the key [W_k c, k_r] and the value W_v c, where W_k and W_v are its rows of kv_b_proj.
With a query [q_n, q_r] and probabilities p:

               expanded                      absorbed
    score    = q_n · (W_k c) + q_r · k_r   = (W_kᵀ q_n) · c + q_r · k_r
    output   = Σ p (W_v c)                 = W_v (Σ p c)

Training uses the expanded form: keys and values of every head are computed, and any attention
backend applies. Decoding uses the absorbed form: queries are projected into the space of the latent
by W_kᵀ and outputs out of it by W_v, so that the cache holds only latents and rotary keys, and
attention has a single key-value head for all query heads.

Source: DeepSeek-V2 report (2024). B batch, T queries, S keys, H heads, R latent dimension.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jaxtune.layers.attention import attention
from jaxtune.layers.attention_portable import join_prefix, xla_attention
from jaxtune.layers.context import Cache, Context
from jaxtune.layers.linear import Linear, effective_weight
from jaxtune.layers.norm import RMSNorm
from jaxtune.layers.rope import rotate_half, rotate_interleaved
from jaxtune.parallel.rules import constrain

# The reference leaves the norms of the latents at their default instead of rms_norm_eps.
LATENT_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MLASizes:
    """Dimensions of latent attention.

    Attributes:
      hidden: width of the residual stream.
      heads: H.
      q_lora: width of the query's latent; None projects queries directly.
      kv_lora: R.
      nope: width of the part of a head's query and key without rotary embedding.
      rope: width of the part with it, which the keys of all heads share.
      v: width of a head's value.
      scale: factor on the scores.
      bias: whether the projections from and to the residual stream have a bias.
      interleaved: whether rotated pairs are (2i, 2i + 1) instead of (i, i + rope / 2).
    """

    hidden: int
    heads: int
    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    v: int
    scale: float
    bias: bool = False
    interleaved: bool = True


class MLA(nnx.Module):
    """Multi-head latent attention."""

    def __init__(self, sizes: MLASizes):
        self.sizes = s = sizes
        q_dim = s.heads * (s.nope + s.rope)
        if s.q_lora is None:
            self.q_proj: Any = Linear(s.hidden, q_dim, axes=("heads", "embed"))
        else:
            self.q_a_proj: Any = Linear(s.hidden, s.q_lora, axes=(None, "embed"), bias=s.bias)
            self.q_a_layernorm: Any = RMSNorm(s.q_lora, LATENT_NORM_EPS)
            self.q_b_proj: Any = Linear(s.q_lora, q_dim, axes=("heads", None))
        latent = s.kv_lora + s.rope
        self.kv_a_proj_with_mqa = Linear(s.hidden, latent, axes=(None, "embed"), bias=s.bias)
        self.kv_a_layernorm = RMSNorm(s.kv_lora, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(s.kv_lora, s.heads * (s.nope + s.v), axes=("heads", None))
        self.o_proj = Linear(s.heads * s.v, s.hidden, axes=("embed", "heads"), bias=s.bias)
        self.prefix: Any = nnx.data(None)

    @property
    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that later tokens attend to, per token.

        The latent past its norm [R], and the rotary key past its rotation, which all heads share.
        """
        return {"latent": (self.sizes.kv_lora,), "rope": (self.sizes.rope,)}

    @property
    def token_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the arrays of `token_shapes`."""
        return {"latent": (None,), "rope": (None,)}

    @property
    def prefix_width(self) -> int:
        """Values of one prefix token: all of `token_shapes`."""
        return self.sizes.kv_lora + self.sizes.rope

    @property
    def activation_widths(self) -> dict[str, int]:
        """Values per token of the output ("out") and of queries, keys and values ("qkv")."""
        s = self.sizes
        return {"out": s.heads * s.v, "qkv": s.heads * (2 * (s.nope + s.rope) + s.v)}

    @property
    def flops_per_pair(self) -> int:
        """Operations for each query and key of one product: the mean of scores and values."""
        s = self.sizes
        return s.heads * (s.nope + s.rope + s.v)

    def cache_shapes(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one layer's cache, by name: `token_shapes` of every token."""
        return {name: (batch, length, *shape) for name, shape in self.token_shapes.items()}

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None = None, layer: Any = 0
    ) -> tuple[jax.Array, Cache | None]:
        """Attends within x [B, T, hidden], and to the cache if there is one; see `Attention`."""
        s = self.sizes
        q_nope, q_rope = self._queries(x, context)
        compressed = self.kv_a_proj_with_mqa(x, context.key_for("kv_a_proj_with_mqa"))
        latent, k_rope = jnp.split(compressed, [s.kv_lora], axis=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = self._rotate(k_rope[:, :, None], context)[:, :, 0]
        if cache is not None:
            cache = context.write(cache, {"latent": latent, "rope": k_rope}, layer)
        if cache is not None and x.shape[1] == 1:
            latent, k_rope = (context.read(cache, layer)[name] for name in ("latent", "rope"))
            out = self._absorbed(q_nope, q_rope, latent, k_rope, context)
        else:
            out = self._expanded(q_nope, q_rope, latent, k_rope, context)
        out = checkpoint_name(out.reshape(*x.shape[:2], -1), "attention")
        return self.o_proj(out, context.key_for("o_proj")), cache

    def _queries(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        s = self.sizes
        if s.q_lora is None:
            q = self.q_proj(x, context.key_for("q_proj"))
        else:
            q = self.q_a_layernorm(self.q_a_proj(x, context.key_for("q_a_proj")))
            q = self.q_b_proj(q, context.key_for("q_b_proj"))
        q = checkpoint_name(q.reshape(*x.shape[:2], s.heads, -1), "q_proj")
        q_nope, q_rope = jnp.split(q, [s.nope], axis=-1)
        return q_nope, self._rotate(q_rope, context)

    def _rotate(self, x: jax.Array, context: Context) -> jax.Array:
        rotate = rotate_interleaved if self.sizes.interleaved else rotate_half
        return rotate(x, context.cos, context.sin)

    def _expanded(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        context: Context,
    ) -> jax.Array:
        """Returns [B, T, H, v] from the keys and values of every head.

        Args:
          q_nope: [B, T, H, nope].
          q_rope: [B, T, H, rope], rotated.
          latent: [B, T, R], normalised.
          k_rope: [B, T, rope], rotated.
          context: positions, segments and options of the pass.
        """
        s = self.sizes
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        k, v = self._keys_values(latent, k_rope, context.key_for("kv_b_proj"))
        k, v = checkpoint_name(k, "k_proj"), checkpoint_name(v, "v_proj")
        prefix = self._prefix(context, latent.dtype)
        return attention(
            constrain(q, "batch", "sequence", "heads", None),
            constrain(k, "batch", None, "heads", None),
            constrain(v, "batch", None, "heads", None),
            q_segments=context.segment_ids,
            kv_segments=context.segment_ids,
            scale=s.scale,
            backend=context.backend,
            prefix=None if prefix is None else self._keys_values(*prefix, None),
        )

    def _keys_values(
        self, latent: jax.Array, k_rope: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Expands latents [..., R] and shared rotary keys [..., rope] to every head.

        Returns:
          (keys [..., H, nope + rope], values [..., H, v]).
        """
        s, lead = self.sizes, latent.shape[:-1]
        kv = self.kv_b_proj(latent, key).reshape(*lead, s.heads, -1)
        k_nope, v = jnp.split(kv, [s.nope], axis=-1)
        shared = jnp.broadcast_to(k_rope[..., None, :], (*lead, s.heads, s.rope))
        return jnp.concatenate([k_nope, shared], axis=-1), v

    def _prefix(self, context: Context, dtype: DTypeLike) -> tuple[jax.Array, jax.Array] | None:
        """Returns the trained latents [n, R] and shared rotary keys [n, rope]."""
        if self.prefix is None:
            return None
        latent, k_rope = jnp.split(self.prefix(context.prefix), [self.sizes.kv_lora], axis=-1)
        return latent.astype(dtype), k_rope.astype(dtype)

    def _absorbed(
        self,
        q_nope: jax.Array,
        q_rope: jax.Array,
        latent: jax.Array,
        k_rope: jax.Array,
        context: Context,
    ) -> jax.Array:
        """Returns [B, T, H, v] from the cached latents, as keys and values of one shared head.

        Arguments are those of `_expanded`, with latents [B, S, R] and keys [B, S, rope] of all
        cached tokens.
        """
        s = self.sizes
        weight, bias = effective_weight(self.kv_b_proj, latent.dtype)
        # [H, nope + v, R] → W_k [H, nope, R] and W_v [H, v, R].
        to_key, to_value = jnp.split(weight.reshape(s.heads, -1, s.kv_lora), [s.nope], axis=1)
        precision = lax.Precision.HIGHEST if latent.dtype == jnp.float32 else None
        q_latent = jnp.einsum("bthn,hnr->bthr", q_nope, to_key, precision=precision)
        k = jnp.concatenate([latent, k_rope], axis=-1)[:, :, None]
        v = latent[:, :, None]
        prefix, n = self._prefix(context, latent.dtype), 0
        if prefix is not None:
            n = prefix[0].shape[0]
            k = join_prefix(jnp.concatenate(prefix, axis=-1)[:, None], k)
            v = join_prefix(prefix[0][:, None], v)
        out = xla_attention(
            jnp.concatenate([q_latent, q_rope], axis=-1),
            k,
            v,
            context.segment_ids,
            context.kv_segment_ids,
            context.cache_index,
            s.scale,
            n,
        )
        out = jnp.einsum("bthr,hvr->bthv", out, to_value, precision=precision)
        if bias is None:
            return out
        # A bias of keys adds the same to all scores of a query, which the softmax ignores. A bias
        # of values is added once, because probabilities sum to 1.
        return out + bias.reshape(s.heads, -1)[:, s.nope :].astype(out.dtype)
