"""What a mixture of experts says of its routing: how even the choice is, and who was chosen.

B batch, T time, E experts, k experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routed(NamedTuple):
    """The routing of one layer, or of several with a leading axis of layers.

    Attributes:
      balance: float32 [B, T], the balance loss of the sequence that each token belongs to, as
        this token's scores have a share in it: the mean over the tokens of a sequence is its loss.
      load: float32 [E], how many tokens chose each expert; padding is not counted.
      gates: float32 [E], the sum of their weights for it.
    """

    balance: jax.Array
    load: jax.Array
    gates: jax.Array


def routed(
    scores: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    counted: jax.Array,
    segment_ids: jax.Array,
) -> Routed:
    """Describes the routing of a layer.

    The balance loss of a sequence of n tokens is Σ_i f_i P_i over experts, with P_i the mean score
    and f_i = E / (k n) times the tokens that chose expert i. It is 1 where the choice is even, and
    its gradient flows through P alone. A packed segment is a sequence of its own.

    Args:
      scores: float32 [B, T, E], those of a token sum to 1.
      experts: int[B, T, k], chosen by each token.
      weights: float32 [B, T, k], of the chosen.
      counted: int[B, T, k], the experts whose tokens f counts.
      segment_ids: int[B, T], at most T; 0 is padding.

    Source: Dai et al., 2024 (DeepSeekMoE), equations 12 to 14; DeepSeek-V2 report, 23 to 25;
    DeepSeek-V3 report, 17 to 20.
    """
    length, count = scores.shape[1:]

    def of_row(chosen: jax.Array, scores: jax.Array, segments: jax.Array) -> jax.Array:
        def total(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, segments, length + 1)

        tokens = jnp.maximum(total(jnp.ones(length)), 1.0)
        share = total(chosen) / tokens[:, None] * (count / experts.shape[-1])
        return jnp.sum(share[segments] * scores, axis=-1)

    balance = jax.vmap(of_row)(_chosen(counted, count), scores, segment_ids)
    real = (segment_ids != 0)[..., None]
    load = jnp.sum(_chosen(experts, count) * real, axis=(0, 1))
    gates = jnp.sum(_chosen(experts, count, weights) * real, axis=(0, 1))
    return Routed(balance, load, gates)


def _chosen(experts: jax.Array, count: int, weights: jax.Array | None = None) -> jax.Array:
    """Returns float32 [..., E] with the weight, or 1, of each expert that is among int[..., k]."""
    chosen = jax.nn.one_hot(experts, count, dtype=jnp.float32)
    return jnp.sum(chosen if weights is None else chosen * weights[..., None], axis=-2)
