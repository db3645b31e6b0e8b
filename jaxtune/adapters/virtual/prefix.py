"""Prefix tuning (P-Tuning v2): trained keys and values in front of every segment, in each layer.

For multi-head and grouped-query attention the format is PEFT's. For latent attention a virtual
token is a normalised latent and a shared rotary key, as in the decoding cache, so that absorbed
decoding can use it.

Source: Li and Liang, 2021; Liu et al., 2021 (P-Tuning v2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.adapters.virtual.common import (
    EMBEDDINGS,
    ENCODER_FILE,
    WEIGHTS_FILE,
    check_match,
    checked,
    count,
    draw,
    prompt_config,
    refuse_extras,
)
from jaxtune.adapters.virtual.encoder import Dense
from jaxtune.config import AdapterConfig
from jaxtune.layers.decoder import Blocks, CausalLM
from jaxtune.layers.tree import Path, Trainable, Tree, bind, flatten, parameter, stack, unflatten
from jaxtune.models.definition import Definition

LATENT = "LATENT_PREFIX"


class OwnPrefix(nnx.Module):
    """The prefix of one layer's attention, trained directly."""

    def __init__(self, virtual_tokens: int, width: int):
        self.embedding = parameter((virtual_tokens, width), (None, None), kind=Trainable)

    def __call__(self, shared: jax.Array | None) -> jax.Array:
        """Returns float32 [n, width]."""
        del shared
        return self.embedding.get_value()


class ProjectedPrefix(nnx.Module):
    """The prefix of one layer's attention, projected from a representation that layers share."""

    def __init__(self, encoder_hidden_size: int, width: int):
        self.projection = Dense(encoder_hidden_size, width, ("kv_heads", "embed"))

    def __call__(self, shared: jax.Array) -> jax.Array:
        """Maps float32 [n, encoder hidden size] to [n, width]."""
        return self.projection(shared)


class PrefixCount(nnx.Module):
    """Holds the number of virtual tokens, for prefixes that are trained directly."""

    def __init__(self, virtual_tokens: int):
        self.virtual_tokens = virtual_tokens

    def __call__(self) -> None:
        """Returns None: there is no shared representation."""


class PrefixEncoder(nnx.Module):
    """The part of the projection that all layers share: an embedding and a dense layer."""

    def __init__(self, virtual_tokens: int, token_dim: int, hidden_size: int):
        self.virtual_tokens = virtual_tokens
        self.embedding = parameter((virtual_tokens, token_dim), (None, None), kind=Trainable)
        self.transform = Dense(token_dim, hidden_size)

    def __call__(self) -> jax.Array:
        """Returns float32 [n, hidden]."""
        return jnp.tanh(self.transform(self.embedding.get_value()))


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Prefix tuning with its settings.

    Attributes:
      virtual_tokens: n.
      projection: trains an embedding and two dense layers that compute the prefixes, instead of
        the prefixes themselves.
      encoder_hidden_size: size between the two dense layers.
    """

    name: ClassVar[str] = "prefix"
    can_merge: ClassVar[bool] = False

    virtual_tokens: int = 20
    projection: bool = False
    encoder_hidden_size: int = 128

    def attach(self, model: CausalLM) -> None:
        """Fills the prefix slots of the decoder and of every layer's attention."""
        decoder, n, hidden = model.decoder, self.virtual_tokens, self.encoder_hidden_size
        for layer, *layers in decoder.blocks:
            width = layer.self_attn.prefix_width
            prefix = ProjectedPrefix(hidden, width) if self.projection else OwnPrefix(n, width)
            layer.self_attn.prefix = stack(prefix, *layers)
        token_dim = _storage(decoder.blocks[0].layer.self_attn)["token_dim"]
        projected = PrefixEncoder(n, token_dim, hidden) if self.projection else None
        decoder.prefix = projected or PrefixCount(n)

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Draws prefixes with the model's initializer_range; a projection as PEFT does."""
        std = 1.0 if self.projection else definition.config.get("initializer_range") or 0.02
        return draw(definition, seed, std), {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns the prefixes of all layers as one matrix [n, layers · width], and the encoder."""
        del constants
        blocks, values = definition.blocks, dict(flatten(trainable))
        config = prompt_config(definition, self.virtual_tokens) | _storage(definition.attention)
        hidden = self.encoder_hidden_size if self.projection else config["token_dim"]
        config |= {"prefix_projection": self.projection, "encoder_hidden_size": hidden}
        if not self.projection:
            # Per block [layers, n, width]; joined over blocks, then layer-major within a token.
            slabs = [np.asarray(values[path]) for path in _slots(blocks, "embedding")]
            embeddings = np.concatenate(slabs).transpose(1, 0, 2).reshape(self.virtual_tokens, -1)
            return StoredAdapter(config, {EMBEDDINGS: embeddings})
        weight, bias = (
            np.concatenate([np.asarray(values[p]) for p in _slots(blocks, "projection", name)])
            for name in ("weight", "bias")
        )
        encoder = {
            "embedding.weight": np.asarray(values["model", "prefix", "embedding"]),
            "transform.0.weight": np.asarray(values["model", "prefix", "transform", "weight"]),
            "transform.0.bias": np.asarray(values["model", "prefix", "transform", "bias"]),
            "transform.2.weight": weight.reshape(-1, weight.shape[-1]),
            "transform.2.bias": bias.reshape(-1),
        }
        shared = bind(nnx.graphdef(definition.prefix), trainable["model"]["prefix"])()
        highest = jax.lax.Precision.HIGHEST
        embeddings = jnp.matmul(shared, encoder["transform.2.weight"].T, precision=highest)
        embeddings = np.asarray(embeddings) + encoder["transform.2.bias"]
        return StoredAdapter(config, {EMBEDDINGS: embeddings}, encoder)

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Splits the stored prefixes, or the encoder's last dense layer, over the layers.

        Raises:
          JaxtuneError: a tensor is missing or has another shape, or a setting does not match.
        """
        blocks, n = definition.blocks, self.virtual_tokens
        width, layers = definition.attention.prefix_width, definition.layer_count
        storage = _storage(definition.attention)
        check_match(stored, storage | {"num_layers": layers})
        if not self.projection:
            shape = (n, layers * width)
            value = checked(stored.tensors, EMBEDDINGS, shape, WEIGHTS_FILE)
            value = value.reshape(n, layers, width).transpose(1, 0, 2)  # [layers, n, width]
            return _cut(blocks, {("embedding",): value}), {}
        token_dim, hidden = storage["token_dim"], self.encoder_hidden_size
        shapes = {
            "embedding.weight": (n, token_dim),
            "transform.0.weight": (hidden, token_dim),
            "transform.0.bias": (hidden,),
            "transform.2.weight": (layers * width, hidden),
            "transform.2.bias": (layers * width,),
        }
        encoder = {
            name: checked(stored.encoder or {}, name, shape, ENCODER_FILE)
            for name, shape in shapes.items()
        }
        tree = _cut(
            blocks,
            {
                ("projection", "weight"): encoder["transform.2.weight"].reshape(layers, width, -1),
                ("projection", "bias"): encoder["transform.2.bias"].reshape(layers, width),
            },
        )
        tree["model"]["prefix"] = {
            "embedding": jnp.asarray(encoder["embedding.weight"]),
            "transform": {
                "weight": jnp.asarray(encoder["transform.0.weight"]),
                "bias": jnp.asarray(encoder["transform.0.bias"]),
            },
        }
        return tree, {}


def _storage(attention: Any) -> dict[str, Any]:
    """Returns the settings of adapter_config.json for a prefix of this kind of attention."""
    shapes = attention.token_shapes
    if "latent" in shapes:
        (kv_lora_rank,), (rope,) = shapes["latent"], shapes["rope"]
        return {
            "peft_type": LATENT,
            "token_dim": attention.prefix_width,
            "kv_lora_rank": kv_lora_rank,
            "qk_rope_head_dim": rope,
        }
    heads, head_dim = shapes["k"]
    return {
        "peft_type": "PREFIX_TUNING",
        "token_dim": heads * head_dim,
        "num_attention_heads": heads,
    }


def _slots(blocks: Sequence[Blocks], *name: str) -> Iterator[Path]:
    """Yields the path of a prefix's array in each of the blocks."""
    for index in range(len(blocks)):
        yield ("model", "layers", str(index), "self_attn", "prefix", *name)


def _cut(blocks: Sequence[Blocks], values: dict[Path, np.ndarray]) -> Tree:
    """Splits arrays [all layers, …] into one array per block, at the paths of prefix slots."""
    return unflatten(
        {
            path: jnp.asarray(value[first : first + layers])
            for name, value in values.items()
            for path, (_, first, layers) in zip(_slots(blocks, *name), blocks, strict=True)
        }
    )


def from_peft(stored: StoredAdapter) -> Prefix:
    """Returns the method of a prefix in PEFT's or the latent format.

    Without the encoder that computed it, the prefix itself is trained further.

    Raises:
      JaxtuneError: a setting is missing or invalid, or the adapter holds other tensors.
    """
    refuse_extras(stored)
    n = count(stored, "num_virtual_tokens")
    if stored.encoder is None:
        return Prefix(n)
    return Prefix(n, True, count(stored, "encoder_hidden_size"))


def from_config(section: AdapterConfig) -> Prefix:
    """Returns the method that the ``adapter`` section of a config describes."""
    return Prefix(section.virtual_tokens, section.prefix_projection, section.encoder_hidden_size)
