"""Trained tokens: chosen rows of embedding and head, in PEFT's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.method import StoredAdapter
from jaxtune.errors import JaxtuneError, closest, shown
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.head import Rows
from jaxtune.layers.tree import Path, Trainable, parameter
from jaxtune.models.definition import Definition
from jaxtune.quant import is_quantized, materialize

SETTING = "trainable_token_indices"
EMBEDDING, HEAD = "embed_tokens", "lm_head"
# (module, its token ids), where the module is EMBEDDING or HEAD.
TokenIds = tuple[tuple[str, tuple[int, ...]], ...]
_DELTA = "trainable_tokens_delta"


class _Place(NamedTuple):
    """Locations of a module's rows.

    Attributes:
      weight: path of the whole weight in the base tree.
      rows: path of the trained rows in the trainable tree.
      key: key of the trained rows in PEFT's file.
    """

    weight: Path
    rows: Path
    key: str


_PLACES = {
    EMBEDDING: _Place(
        ("model", EMBEDDING, "weight"),
        ("model", EMBEDDING, "adapter", _DELTA),
        f"base_model.model.model.{EMBEDDING}.token_adapter.{_DELTA}",
    ),
    HEAD: _Place(
        (HEAD, "weight"),
        ("lm_head_rows", _DELTA),
        f"base_model.model.{HEAD}.token_adapter.{_DELTA}",
    ),
}


class TokenRows(nnx.Module):
    """The trained rows [n, hidden] that replace those of the tokens `ids` in a weight."""

    def __init__(self, ids: tuple[int, ...], hidden_size: int):
        self.ids = ids
        shape = (len(ids), hidden_size)
        self.trainable_tokens_delta = parameter(shape, (None, "embed"), kind=Trainable)

    def rows(self) -> Rows:
        """Returns the ids and the trained rows, float32 [n, hidden]."""
        return Rows(jnp.asarray(self.ids, jnp.int32), self.trainable_tokens_delta.get_value())

    def replace(self, tokens: jax.Array, embedded: jax.Array) -> jax.Array:
        """Replaces the embeddings [B, T, H] of trained tokens among the tokens int[B, T].

        A binary search finds each token among the sorted trained ids. Where it is not one of them,
        `searchsorted` returns the place at which it would be inserted, whose id differs.
        """
        order = np.argsort(self.ids)
        ids = jnp.asarray(np.asarray(self.ids)[order], jnp.int32)
        place = jnp.minimum(jnp.searchsorted(ids, tokens), len(ids) - 1)
        found = ids[place] == tokens
        trained = jnp.take(self.rows().values, jnp.asarray(order)[place], axis=0, mode="clip")
        return jnp.where(found[..., None], trained.astype(embedded.dtype), embedded)


def look_up(last: int, names: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """Returns the ids of the tokenizer's last tokens and of tokens given by name.

    Args:
      last: number of tokens with the highest ids.
      names: further tokens, spelled as in the vocabulary.
      tokenizer: the base model's tokenizer, or None.

    Raises:
      JaxtuneError: there is no tokenizer, or it lacks one of the tokens.
    """
    if tokenizer is None:
        raise JaxtuneError(
            "adapter.new_tokens and adapter.train_tokens need the tokenizer, and the model has none"
        )
    vocabulary = tokenizer.get_vocab()
    # Ids may have gaps, so the last tokens are not simply those from len(vocabulary) - last on.
    known = sorted(set(vocabulary.values()))
    if last > len(known):
        raise JaxtuneError(f"adapter.new_tokens={last}: the tokenizer has {len(known)} tokens")
    ids = known[len(known) - last :]
    for name in names:
        if name not in vocabulary:
            near = closest(name, tokenizer.get_added_vocab())
            raise JaxtuneError(
                f'adapter.train_tokens: the tokenizer has no token "{name}"{near}; a new one '
                "has to be added to it first (tokenizer.add_tokens of transformers)"
            )
        ids.append(vocabulary[name])
    return tuple(dict.fromkeys(ids))


def attach(model: CausalLM, rows: Mapping[str, Sequence[int]], key: str) -> None:
    """Fills the slots for trained rows of the embedding and the head.

    Args:
      model: an abstract model.
      rows: token ids by module.
      key: name of the setting, for messages.

    Raises:
      JaxtuneError: the model has no row for a token.
    """
    vocab_size, hidden_size = model.vocab_size, model.hidden_size
    for module, ids in rows.items():
        if max(ids) >= vocab_size:
            raise JaxtuneError(
                f"{key}: token {max(ids)} has no row in the model, which has {vocab_size}: enlarge "
                f"the base first (model.resize_token_embeddings({max(ids) + 1}) of transformers)"
            )
        filled = TokenRows(tuple(ids), hidden_size)
        if module == EMBEDDING:
            model.decoder.embed_tokens.adapter = filled
        else:
            model.lm_head_rows = filled


def start(definition: Definition, weights: Mapping[Path, Any]) -> dict[Path, jax.Array]:
    """Returns the initial rows float32 [n, hidden], those of the base, by path."""

    def rows(weight: Any, ids: Sequence[int]) -> jax.Array:
        plain = materialize(weight, jnp.float32) if is_quantized(weight) else weight
        return plain[jnp.asarray(ids)].astype(jnp.float32)

    return {place.rows: rows(weights[place.weight], ids) for place, ids in _attached(definition)}


def read(definition: Definition, stored: StoredAdapter) -> dict[Path, jax.Array]:
    """Returns the rows float32 [n, hidden] of an adapter on disk, by path.

    Raises:
      JaxtuneError: the rows are missing or have another shape.
    """
    found: dict[Path, jax.Array] = {}
    for place, _ in _attached(definition):
        shape = definition.leaves[place.rows].declaration.shape
        value = stored.tensors.get(place.key, np.zeros(0))
        if value.shape != shape:
            raise JaxtuneError(
                f'adapter_model.safetensors: "{place.key}" has shape {list(value.shape)}, the '
                f"model needs {list(shape)}"
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise JaxtuneError(
                f'adapter_model.safetensors: "{place.key}" is {value.dtype}, not floating point'
            )
        found[place.rows] = jnp.asarray(value, jnp.float32)
    return found


def write(definition: Definition, trainable: Mapping[Path, Any], stored: StoredAdapter) -> None:
    """Adds trained rows and their ids to `stored`; PEFT ties those of a tied head when loading."""
    setting = {}
    for place, ids in _attached(definition):
        stored.tensors[place.key] = np.asarray(trainable[place.rows], np.float32)
        setting[place.weight[-2]] = list(ids)
    if setting:
        stored.config[SETTING] = setting[EMBEDDING] if list(setting) == [EMBEDDING] else setting


def _attached(definition: Definition) -> list[tuple[_Place, tuple[int, ...]]]:
    slots = definition.trained_rows
    return [(_PLACES[name], rows.ids) for name, rows in slots.items() if rows is not None]


def on_disk(stored: StoredAdapter) -> TokenIds:
    """Returns the trained tokens of an adapter on disk.

    Raises:
      JaxtuneError: modules other than the embedding and the head, or invalid token ids.
    """
    found = stored.config.get(SETTING) or {}
    rows: dict[str, tuple[int, ...]] = {}
    for name, ids in (found if isinstance(found, Mapping) else {EMBEDDING: found}).items():
        module = str(name).rpartition(".")[-1]
        if module not in _PLACES:
            raise JaxtuneError(
                f'adapter_config.json: "{SETTING}" has tokens of "{name}"; only {EMBEDDING} and '
                f"{HEAD} have a row for each token"
            )
        whole = isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        if not whole or len(set(ids)) < len(ids):
            raise JaxtuneError(
                f'adapter_config.json: "{SETTING}" has {shown(ids)} for {module}, not a list '
                "of distinct token ids"
            )
        if ids:
            rows[module] = tuple(ids)
    return tuple(rows.items())


def without(stored: StoredAdapter) -> dict[str, np.ndarray]:
    """Returns the tensors of an adapter on disk except the rows [n, hidden] of its tokens."""
    keys = {_PLACES[module].key for module, _ in on_disk(stored)}
    # PEFT writes no rows for an empty list of tokens.
    return {k: v for k, v in stored.tensors.items() if k not in keys and v.shape[:1] != (0,)}
