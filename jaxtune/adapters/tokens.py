"""New tokens: only the last rows of the embedding are trained, and stored as PEFT stores them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.adapters.method import Stored
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Path, Trainable, parameter
from jaxtune.models.definition import Definition

_EMBEDDING: Path = ("model", "embed_tokens")
PATH: Path = (*_EMBEDDING, "adapter", "trainable_tokens_delta")
KEY = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
SETTING = "trainable_token_indices"


class NewTokens(nnx.Module):
    """The rows [n, hidden] that take the place of an embedding's last ones."""

    def __init__(self, count: int, vocab_size: int, hidden_size: int):
        self.first = vocab_size - count
        shape = (count, hidden_size)
        self.trainable_tokens_delta = parameter(shape, (None, "embed"), kind=Trainable)

    def rows(self) -> jax.Array:
        """Returns the trained rows, float32 [n, hidden]."""
        return self.trainable_tokens_delta.get_value()

    def replace(self, tokens: jax.Array, embedded: jax.Array) -> jax.Array:
        """Puts the trained rows where tokens int[B, T] are new, in their embeddings [B, T, H]."""
        index = tokens - self.first
        trained = jnp.take(self.rows(), jnp.maximum(index, 0), axis=0, mode="clip")
        return jnp.where((index >= 0)[..., None], trained.astype(embedded.dtype), embedded)

    def merged(self, weight: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the whole embedding [vocabulary, hidden]."""
        return jnp.concatenate([weight[: self.first].astype(dtype), self.rows().astype(dtype)])


def attach(model: CausalLM, count: int) -> None:
    """Fills the embedding's slot.

    Raises:
      JaxtuneError: more tokens than there are.
    """
    embedding = model.model.embed_tokens
    vocab_size, hidden_size = embedding.weight.get_value().shape
    if count >= vocab_size:
        raise JaxtuneError(f"adapter.new_tokens={count} is not less than all {vocab_size} tokens")
    embedding.adapter = NewTokens(count, vocab_size, hidden_size)


def start(count: int, weights: dict[Path, Any]) -> jax.Array:
    """Returns the last rows [n, hidden] of the base's embedding, where training starts."""
    return jnp.copy(weights[(*_EMBEDDING, "weight")][-count:].astype(jnp.float32))


def read(definition: Definition, stored: Stored) -> jax.Array:
    """Returns the rows [n, hidden] of an adapter on disk.

    Raises:
      JaxtuneError: they do not fit the model, or are not its last ones.
    """
    shape = definition.leaves[PATH].declaration.shape
    value = stored.tensors.get(KEY, np.zeros(0))
    if value.shape != shape:
        raise JaxtuneError(
            f"adapter_model.safetensors: trainable_tokens_delta has shape {list(value.shape)}, "
            f"the model needs {list(shape)}"
        )
    if stored.config[SETTING] != indices(definition):
        raise JaxtuneError(
            f'adapter_config.json: "{SETTING}" are not the last {shape[0]} tokens of the model, '
            "and others are not supported"
        )
    return jnp.asarray(value, jnp.float32)


def indices(definition: Definition) -> list[int]:
    """Returns the ids of the new tokens."""
    last = definition.leaves[(*_EMBEDDING, "weight")].declaration.shape[0]
    return list(range(last - definition.leaves[PATH].declaration.shape[0], last))


def count_on_disk(stored: Stored) -> int:
    """Returns how many tokens an adapter on disk has trained.

    Raises:
      JaxtuneError: rows of anything but the embedding.
    """
    found = stored.config.get(SETTING) or []
    if not isinstance(found, list):
        raise JaxtuneError(f'adapter_config.json: "{SETTING}"={found!r} is not a list of tokens')
    return len(found)
