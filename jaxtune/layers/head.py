"""The head: hidden states to logits, with whatever edit its weight carries."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.layers.linear import LowRank, linear_float32


class Head(NamedTuple):
    """The weight [vocabulary, hidden] of the head, and its low-rank edit if it has one."""

    weight: Any
    edit: LowRank | None = None

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits [..., vocabulary] of hidden [..., hidden]."""
        logits = linear_float32(hidden, self.weight)
        if self.edit is None:
            return logits
        xa = linear_float32(hidden, self.edit.lora_A).astype(hidden.dtype)
        return logits + self.edit.scale.astype(jnp.float32) * linear_float32(xa, self.edit.lora_B)
