"""The head: hidden states to logits, with the edit of its weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxtune.layers.linear import Edit, linear_float32, rescale
from jaxtune.parallel.rules import constrain
from jaxtune.quant import QuantizedWeight, is_quantized


class Rows(NamedTuple):
    """Rows that replace some rows of a weight.

    Attributes:
      ids: int32 [n], unique indices of the rows.
      values: float32 [n, hidden].
    """

    ids: jax.Array
    values: jax.Array


class Head(NamedTuple):
    """The weight [vocabulary, hidden] of the head, its edit, and replacements of some of its rows.

    A NamedTuple rather than a module, so that the loss can differentiate it as a pytree.
    """

    weight: Any
    edit: Edit = Edit()
    rows: Rows | None = None

    def gathered(self) -> Head:
        """Returns the head with its weight gathered along the hidden axis.

        A loop over chunks of tokens would otherwise gather the weight in every iteration.
        """
        weight = self.weight
        if isinstance(weight, QuantizedWeight):
            return self._replace(weight=weight.gathered())
        if is_quantized(weight):
            return self
        return self._replace(weight=constrain(weight, "vocab", None))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., vocabulary] of hidden [..., hidden]."""
        term, out_scale, in_scale, bias = self.edit
        hidden = rescale(hidden, in_scale)
        logits = linear_float32(hidden, self.weight)
        if term is not None:
            xa = linear_float32(hidden, term.lora_A).astype(hidden.dtype)
            xa = rescale(xa, term.rank_scale)
            logits = logits + term.scale * linear_float32(xa, term.lora_B)
        logits = rescale(logits, out_scale)
        if self.rows is not None:
            replaced = linear_float32(hidden, self.rows.values)
            logits = logits.at[..., self.rows.ids].set(replaced, unique_indices=True)
        return logits if bias is None else logits + bias
