"""Prompt tuning: trained embeddings of virtual tokens in front of every example.

Source: Lester et al., 2021.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.adapters.virtual.common import (
    EMBEDDINGS,
    WEIGHTS_FILE,
    check_match,
    checked,
    count,
    draw,
    prompt_config,
    refuse_extras,
)
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Trainable, Tree, parameter
from jaxtune.models.definition import Definition
from jaxtune.vocabulary import check_token_ids


class VirtualTokens(nnx.Module):
    """Embeddings of virtual tokens, trained directly."""

    def __init__(self, virtual_tokens: int, hidden_size: int):
        self.virtual_tokens = virtual_tokens
        self.embedding = parameter((virtual_tokens, hidden_size), (None, None), kind=Trainable)

    def __call__(self, key: jax.Array | None) -> jax.Array:
        """Returns float32 [n, hidden]."""
        del key
        return self.embedding.get_value()


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Prompt tuning with its settings.

    Attributes:
      virtual_tokens: n.
      init_text: text whose token embeddings are the initial values; empty for random ones.
    """

    name: ClassVar[str] = "prompt"
    can_merge: ClassVar[bool] = False

    virtual_tokens: int = 20
    init_text: str = ""

    def attach(self, model: CausalLM) -> None:
        """Fills the prompt slot of the decoder."""
        model.decoder.prompt = VirtualTokens(self.virtual_tokens, model.hidden_size)

    def start(self, tokenizer: Any, embeddings: Callable[[], np.ndarray]) -> StoredAdapter | None:
        """Returns the embeddings [n, hidden] of the text's tokens, repeated or cut as PEFT does.

        Raises:
          JaxtuneError: there is no tokenizer, the text is empty, or a token has no embedding.
        """
        if not self.init_text:
            return None
        if tokenizer is None:
            raise JaxtuneError("adapter.prompt_init_text needs a tokenizer: the model has no files")
        ids = tokenizer(self.init_text)["input_ids"]
        if not ids:
            raise JaxtuneError(f'adapter.prompt_init_text="{self.init_text}" has no tokens')
        ids = (ids * math.ceil(self.virtual_tokens / len(ids)))[: self.virtual_tokens]
        table = embeddings()
        check_token_ids(ids, table.shape[0], "adapter.prompt_init_text")
        rows = np.asarray(table[np.asarray(ids)], np.float32)
        return StoredAdapter({"token_dim": rows.shape[1]}, {EMBEDDINGS: rows})

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Draws embeddings with the model's initializer_range."""
        std = definition.config.get("initializer_range") or 0.02
        return draw(definition, seed, std), {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns the config and the embeddings [n, hidden]."""
        del constants
        config = prompt_config(definition, self.virtual_tokens) | {
            "peft_type": "PROMPT_TUNING",
            "token_dim": definition.hidden_size,
            # With an initial text PEFT would load a tokenizer, although the values are in the file.
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
        }
        embeddings = np.asarray(trainable["model"]["prompt"]["embedding"], np.float32)
        return StoredAdapter(config, {EMBEDDINGS: embeddings})

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Returns the embeddings as the only trainable array.

        Raises:
          JaxtuneError: the embeddings are missing or do not fit the model.
        """
        hidden = definition.hidden_size
        check_match(stored, {"token_dim": hidden})
        shape = (self.virtual_tokens, hidden)
        value = checked(stored.tensors, EMBEDDINGS, shape, WEIGHTS_FILE)
        return {"model": {"prompt": {"embedding": jnp.asarray(value)}}}, {}


def from_peft(stored: StoredAdapter) -> Prompt:
    """Returns the method of a prompt in PEFT's format.

    Raises:
      JaxtuneError: a setting is missing or invalid, or the adapter holds other tensors.
    """
    refuse_extras(stored)
    return Prompt(count(stored, "num_virtual_tokens"))


def from_config(section: AdapterConfig) -> Prompt:
    """Returns the method that the ``adapter`` section of a config describes."""
    return Prompt(section.virtual_tokens, section.prompt_init_text)
