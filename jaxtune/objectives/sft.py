"""Supervised fine-tuning: cross-entropy of the target tokens."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.objectives.cross_entropy import TokenLoss, cross_entropy


def sft_loss(
    model: CausalLM,
    batch: Mapping[str, jax.Array],
    options: ForwardOptions,
    key: jax.Array | None,
) -> TokenLoss:
    """Returns the summed loss of a batch and what to divide it by.

    Args:
      model: a bound model.
      batch: ``tokens``, ``targets``, ``segment_ids`` and ``positions``, each int[B, T].
      options: of the forward pass.
      key: for dropout; None turns it off.
    """
    hidden, _ = model.hidden(
        batch["tokens"], batch["segment_ids"], batch["positions"], options, key=key
    )
    return cross_entropy(hidden, model.head(), batch["targets"], options.tokens_per_chunk)
