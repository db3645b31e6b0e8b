"""Supervised fine-tuning: cross-entropy of the target tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.objectives.balance import ExpertSums, expert_sums
from jaxtune.objectives.cross_entropy import cross_entropy


class BatchSums(NamedTuple):
    """What an objective gives for a batch: sums, float32.

    Attributes:
      loss: a scalar.
      weight: what to divide it by, once, over the whole batch; a scalar.
      correct: targets that are the likeliest token; a scalar.
      experts: of the routing; None for a model without experts.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    experts: ExpertSums | None


def sft_loss(
    model: CausalLM,
    batch: Mapping[str, jax.Array],
    options: ForwardOptions,
    key: jax.Array | None,
) -> BatchSums:
    """Returns the summed loss of a batch and what to divide it by.

    Args:
      model: a bound model.
      batch: ``tokens``, ``targets``, ``segment_ids`` and ``positions``, each int[B, T].
      options: of the forward pass.
      key: for dropout; None turns it off.
    """
    targets, segment_ids = batch["targets"], batch["segment_ids"]
    hidden, routing = model.hidden_with_routing(
        batch["tokens"], segment_ids, batch["positions"], options, key=key
    )
    sums = cross_entropy(hidden, model.head(), targets, options.tokens_per_chunk)
    experts = None if routing is None else expert_sums(routing, targets, segment_ids)
    return BatchSums(*sums, experts=experts)
