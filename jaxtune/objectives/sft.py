"""Supervised fine-tuning: cross-entropy of the target tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax

from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.objectives.balance import ExpertSums, expert_sums
from jaxtune.objectives.cross_entropy import NO_TERMS, LossTerms, cross_entropy


class BatchSums(NamedTuple):
    """The sums of an objective over a batch, float32.

    Attributes:
      loss: the minimised sum; a scalar.
      weight: its divisor, applied once over the whole batch; a scalar.
      correct: number of targets that are the most likely token; a scalar.
      nll: −log p of the targets, reported as the loss; a scalar.
      uniform: cross-entropy of the uniform distribution, with label smoothing; a scalar.
      squared_norm: squared log-normalisers of the targets; a scalar.
      experts: sums of the routing; None for a model without experts.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    nll: jax.Array
    uniform: jax.Array
    squared_norm: jax.Array
    experts: ExpertSums | None


def sft_loss(
    model: CausalLM,
    batch: Mapping[str, jax.Array],
    options: ForwardOptions,
    key: jax.Array | None,
    scale: jax.Array | None = None,
    terms: LossTerms = NO_TERMS,
) -> BatchSums:
    """Returns the summed loss of a batch, with its divisor.

    Args:
      model: a bound model.
      batch: ``tokens``, ``targets``, ``segment_ids`` and ``positions``, each int[B, T].
      options: options of the forward pass.
      key: for dropout and noise; None turns them off.
      scale: the caller's factor on the loss; see `cross_entropy`.
      terms: additional terms of the loss.
    """
    targets, segment_ids = batch["targets"], batch["segment_ids"]
    hidden, _, routing = model.decoder(
        batch["tokens"], segment_ids, batch["positions"], options, key
    )
    sums = cross_entropy(hidden, model.head(), targets, options.tokens_per_chunk, terms, scale)
    experts = None if routing is None else expert_sums(routing, targets, segment_ids)
    return BatchSums(*sums, experts=experts)
