"""P-Tuning: virtual tokens that a small network computes from trained embeddings.

Source: Liu et al., 2021 (GPT Understands, Too); the network is PEFT's PromptEncoder.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.adapters.virtual import prompt
from jaxtune.adapters.virtual.common import (
    EMBEDDINGS,
    ENCODER_FILE,
    check_match,
    checked,
    count,
    draw,
    prompt_config,
)
from jaxtune.adapters.virtual.encoder import LSTM, Dense
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Path, Trainable, Tree, bind, flatten, parameter, unflatten
from jaxtune.models.definition import Definition

ENCODERS = ("MLP", "LSTM")


class PromptEncoder(nnx.Module):
    """Embeddings, an optional bidirectional LSTM, and dense layers with ReLU between them."""

    def __init__(self, hidden_size: int, settings: PTuning):
        width, hidden = settings.encoder_hidden_size, hidden_size
        self.virtual_tokens = settings.virtual_tokens
        self.embedding = parameter((self.virtual_tokens, hidden), (None, None), kind=Trainable)
        recurrent = settings.encoder == "LSTM"
        lstm = LSTM(hidden, width, settings.num_layers, settings.dropout) if recurrent else None
        self.lstm_head: Any = nnx.data(lstm)
        widths = (2 * width, 2 * width, hidden) if recurrent else (hidden, width, width, hidden)
        self.mlp_head = nnx.List([Dense(a, b) for a, b in itertools.pairwise(widths)])

    def __call__(self, key: jax.Array | None) -> jax.Array:
        """Returns float32 [n, hidden]."""
        x = self.embedding.get_value()
        if self.lstm_head is not None:
            x = self.lstm_head(x, key)
        *first, last = self.mlp_head
        for dense in first:
            x = jax.nn.relu(dense(x))
        return last(x)


@dataclasses.dataclass(frozen=True)
class PTuning(Method):
    """P-Tuning with its settings.

    Attributes:
      virtual_tokens: n.
      encoder: "MLP" (three dense layers) or "LSTM" (an LSTM and two dense layers).
      encoder_hidden_size: hidden size of the network.
      num_layers: number of layers of the LSTM.
      dropout: dropout rate between the layers of the LSTM.
    """

    name: ClassVar[str] = "ptuning"
    can_merge: ClassVar[bool] = False

    virtual_tokens: int = 20
    encoder: str = "MLP"
    encoder_hidden_size: int = 128
    num_layers: int = 2
    dropout: float = 0.0

    def attach(self, model: CausalLM) -> None:
        """Fills the prompt slot of the decoder.

        Raises:
          JaxtuneError: dropout without an LSTM of several layers.
        """
        if self.dropout and (self.encoder == "MLP" or self.num_layers == 1):
            raise JaxtuneError(
                "adapter.dropout must be 0 with P-Tuning: it applies between the layers of an "
                "LSTM, and this encoder has no such layers"
            )
        model.decoder.prompt = PromptEncoder(model.hidden_size, self)

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Draws the network's initial values as PEFT does."""
        return draw(definition, seed, 1.0), {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns the embeddings that the network computes and, as `encoder`, the network."""
        del constants
        config = prompt_config(definition, self.virtual_tokens) | {
            "peft_type": "P_TUNING",
            "token_dim": definition.hidden_size,
            "encoder_reparameterization_type": self.encoder,
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": self.num_layers,
            "encoder_dropout": self.dropout,
        }
        tree = trainable["model"]["prompt"]
        encoder = {_name(path): np.asarray(v, np.float32) for path, v in flatten(tree)}
        embeddings = bind(nnx.graphdef(definition.prompt), tree)(None)
        return StoredAdapter(config, {EMBEDDINGS: np.asarray(embeddings)}, encoder)

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Returns the network's arrays as trainable.

        Raises:
          JaxtuneError: an array is missing or has another shape.
        """
        check_match(stored, {"token_dim": definition.hidden_size})
        tree = definition.abstract("trainable")["model"]["prompt"]
        values = {
            path: jnp.asarray(checked(stored.encoder or {}, _name(path), like.shape, ENCODER_FILE))
            for path, like in flatten(tree)
        }
        return {"model": {"prompt": unflatten(values)}}, {}


def _name(path: Path) -> str:
    """Returns PEFT's name of an array; in ``mlp_head`` dense layers alternate with ReLUs."""
    if path == ("embedding",):
        return "embedding.weight"
    return ".".join(str(2 * int(part)) if part.isdigit() else part for part in path)


def from_peft(stored: StoredAdapter) -> Method:
    """Returns P-Tuning, or prompt tuning if the stored adapter comes without its network.

    Raises:
      JaxtuneError: a setting is missing or invalid, or the adapter holds other tensors.
    """
    plain = prompt.from_peft(stored)
    if stored.encoder is None:
        return plain
    kind = str(stored.config.get("encoder_reparameterization_type"))
    lookup(dict.fromkeys(ENCODERS), kind, 'adapter_config.json: "encoder_reparameterization_type"')
    dropout = float(stored.config.get("encoder_dropout") or 0.0)
    hidden, layers = count(stored, "encoder_hidden_size"), count(stored, "encoder_num_layers")
    return PTuning(plain.virtual_tokens, kind, hidden, layers, dropout if kind == "LSTM" else 0.0)


def from_config(section: AdapterConfig) -> PTuning:
    """Returns the method that the ``adapter`` section of a config describes."""
    return PTuning(
        section.virtual_tokens,
        section.encoder_reparameterization_type,
        section.encoder_hidden_size,
        section.encoder_num_layers,
        section.dropout,
    )
