"""The load-balancing loss of a mixture of experts, as a sum that shares the weight of the loss."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.layers.experts.routing_stats import Routed
from jaxtune.objectives.cross_entropy import IGNORE


class ExpertSums(NamedTuple):
    """Sums over the tokens of a batch, float32.

    Attributes:
      balance: the balance losses of its sequences, summed over layers, each times the sequence's
        targets; a scalar. Divided by all targets it is their weighted mean.
      load: [layers, E], tokens that chose each expert.
    """

    balance: jax.Array
    load: jax.Array


def expert_sums(routing: Routed, targets: jax.Array, segment_ids: jax.Array) -> ExpertSums:
    """Sums the routing of a batch.

    A sequence counts as much as its targets do in the loss, so that one weight divides both, and
    neither the split into micro-batches nor packing changes the balance loss of a batch.

    Args:
      routing: of every mixture, with a leading axis of layers.
      targets: int[B, T].
      segment_ids: int[B, T], at most T; 0 is padding.
    """

    def of_row(counted: jax.Array, segments: jax.Array) -> jax.Array:
        """Returns for each token its sequence's targets per token."""

        def total(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, segments, segments.shape[0] + 1)

        share = total(counted) / jnp.maximum(total(jnp.ones_like(counted)), 1.0)
        return share[segments]

    weight = jax.vmap(of_row)((targets != IGNORE).astype(jnp.float32), segment_ids)
    return ExpertSums(jnp.sum(routing.balance * weight), routing.load)
