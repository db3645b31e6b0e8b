"""Statistics of a mixture's routing: the balance loss and the load of each expert.

B batch, T time, E experts, k experts per token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routed(NamedTuple):
    """The routing of one layer, or of several with a leading axis of layers.

    Attributes:
      balance: float32 [B, T], each token's term of the balance loss of its sequence, which is the
        mean over the tokens of the sequence.
      load: float32 [E], number of tokens that chose each expert, without padding.
      gates: float32 [E], sum of their weights for each expert.
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
    """Returns the statistics of a layer's routing.

    The balance loss of a sequence of n tokens is Σ_i f_i P_i over experts, where P_i is the mean
    score of expert i and f_i is E / (k n) times the number of tokens that chose it. It is 1 for an
    even choice, and its gradient flows through P alone. Each packed segment is a sequence.

    Args:
      scores: float32 [B, T, E], which sum to 1 for each token.
      experts: int[B, T, k], the chosen experts of each token.
      weights: float32 [B, T, k], weights of the chosen experts.
      counted: int[B, T, k], the experts of each token that f counts.
      segment_ids: int[B, T], at most T; 0 is padding.

    Source: Dai et al., 2024 (DeepSeekMoE), equations 12 to 14; DeepSeek-V2 report, 23 to 25;
    DeepSeek-V3 report, 17 to 20.
    """
    length, count = scores.shape[1:]

    def of_row(chosen: jax.Array, scores: jax.Array, segments: jax.Array) -> jax.Array:
        def total(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, segments, length + 1)

        # Sums per segment id, [length + 1], and share f_i of every segment, [length + 1, E]; each
        # token then takes the f of its segment, so that the mean over a segment is Σ_i f_i P_i.
        tokens = jnp.maximum(total(jnp.ones(length)), 1.0)
        share = total(chosen) / tokens[:, None] * (count / experts.shape[-1])
        return jnp.sum(share[segments] * scores, axis=-1)

    balance = jax.vmap(of_row)(_chosen(counted, count), scores, segment_ids)
    real = (segment_ids != 0)[..., None]
    load = jnp.sum(_chosen(experts, count) * real, axis=(0, 1))
    gates = jnp.sum(_chosen(experts, count, weights) * real, axis=(0, 1))
    return Routed(balance, load, gates)


def _chosen(experts: jax.Array, count: int, weights: jax.Array | None = None) -> jax.Array:
    """Returns float32 [..., E]: the weight, or 1, of each expert in int[..., k], else 0."""
    chosen = jax.nn.one_hot(experts, count, dtype=jnp.float32)
    return jnp.sum(chosen if weights is None else chosen * weights[..., None], axis=-2)
