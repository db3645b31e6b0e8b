"""The load-balancing loss of a mixture of experts, as a sum with the divisor of the main loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.layers.experts.routing_stats import Routed
from jaxtune.objectives.cross_entropy import IGNORE


class ExpertSums(NamedTuple):
    """Sums over the tokens of a batch, float32.

    Attributes:
      balance: balance losses of the sequences, summed over layers, each multiplied by the number of
        targets in the sequence; a scalar. Divided by all targets it is their weighted mean.
      load: [layers, E], number of tokens that chose each expert.
    """

    balance: jax.Array
    load: jax.Array


def expert_sums(routing: Routed, targets: jax.Array, segment_ids: jax.Array) -> ExpertSums:
    """Sums the routing of a batch.

    Each sequence is weighted by its targets, as in the loss: one divisor serves both, and neither
    packing nor the split into micro-batches changes the balance loss of a batch.

    Args:
      routing: routing of every mixture, with a leading axis of layers.
      targets: int[B, T].
      segment_ids: int[B, T], at most T; 0 is padding.
    """

    def of_row(counted: jax.Array, segments: jax.Array) -> jax.Array:
        """Returns float32 [T]: the targets per token of each token's sequence."""

        def total(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, segments, segments.shape[0] + 1)

        # Per segment id, [T + 1]: targets over tokens.
        share = total(counted) / jnp.maximum(total(jnp.ones_like(counted)), 1.0)
        return share[segments]

    weight = jax.vmap(of_row)((targets != IGNORE).astype(jnp.float32), segment_ids)
    return ExpertSums(jnp.sum(routing.balance * weight), routing.load)
