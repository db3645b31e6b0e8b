"""Token embeddings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.layers.tree import parameter


class Embedding(nnx.Module):
    """A table [vocabulary, hidden], with an adapter slot for trained rows."""

    def __init__(self, vocab_size: int, hidden_size: int):
        self.weight = parameter((vocab_size, hidden_size), ("vocab", "embed"))
        self.adapter: Any = nnx.data(None)

    def __call__(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Looks up tokens int[B, T]; returns [B, T, hidden] in `dtype`."""
        rows = jnp.take(self.weight.get_value(), tokens, axis=0, mode="clip").astype(dtype)
        return rows if self.adapter is None else self.adapter.replace(tokens, rows)
