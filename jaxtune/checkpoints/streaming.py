"""Streams a checkpoint into a tree of arrays, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtune.checkpoints.embeddings import HEAD, TIED
from jaxtune.checkpoints.finite import copy_finite
from jaxtune.checkpoints.quantize import read_quantized
from jaxtune.checkpoints.source import ALL, TensorSource
from jaxtune.checkpoints.staging import (
    Fetch,
    Range,
    Rounds,
    Staging,
    boxes_of_shares,
    copy,
    fill,
)
from jaxtune.errors import JaxtuneError, closest
from jaxtune.layers.tree import Path, Tree, layer_names, unflatten
from jaxtune.models.definition import Definition, Leaf, as_matrix, check_experts, undivided
from jaxtune.progress import track

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_BEYOND = "of a layer beyond the num_hidden_layers of config.json"


def _ignored(name: str, config: Mapping[str, Any], mtp_layers: Collection[str]) -> str | None:
    """Returns the reason why an extra tensor may be ignored; None if it is an error.

    Args:
      name: name of the tensor.
      config: content of config.json.
      mtp_layers: numbers of the layers for multi-token prediction.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from config.json"
    if name == HEAD and config.get(TIED):
        return "tied to the embedding"
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config["num_hidden_layers"]:
        mtp = "a multi-token-prediction layer, which fine-tuning does not use"
        return mtp if layer[1] in mtp_layers else _BEYOND
    return None


def check_names(definition: Definition, source: TensorSource) -> dict[str, str]:
    """Compares the names, shapes and dtypes of model and checkpoint.

    Returns:
      {ignored tensor: reason}.

    Raises:
      JaxtuneError: tensors are missing, unknown, or of the wrong shape or dtype.
    """
    needed: dict[str, tuple[int, ...]] = {}
    for path, leaf in definition.in_checkpoint().items():
        for name in layer_names(path, leaf.declaration):
            needed[name] = leaf.declaration.shape
    present = set(source.names())
    # Layers for multi-token prediction come after num_hidden_layers; only they have eh_proj.
    mtp_layers = {
        layer[1] for name in present if (layer := _LAYER.match(name)) and ".eh_proj." in name
    }
    ignored = {
        name: reason
        for name in sorted(present - set(needed))
        if (reason := _ignored(name, definition.config, mtp_layers))
    }
    if beyond := [name for name, reason in ignored.items() if reason == _BEYOND]:
        logger.warning(
            "%s: %d tensor(s) are %s (%d) and are not used: %s",
            source.path,
            len(beyond),
            _BEYOND,
            definition.config["num_hidden_layers"],
            _some(beyond, 2),
        )
    missing = sorted(set(needed) - present)
    extra = sorted(present - set(needed) - set(ignored))
    dtypes = [
        f"{name} is {source.dtype(name)} ({source.where(name)})"
        for name in sorted(needed)
        if name in present and not jnp.issubdtype(source.dtype(name), jnp.floating)
    ]
    shapes = [
        f"{name} is {list(source.shape(name))}, not {list(shape)} ({source.where(name)})"
        for name, shape in sorted(needed.items())
        if name in present and source.shape(name) != shape
    ]
    problems = [
        f"{len(names)} tensor(s) {what}: {_some(names)}{hint}"
        for what, names, hint in (
            ("missing", missing, _hint(missing, extra)),
            ("not in the architecture", extra, ""),
            ("of the wrong shape", shapes, ""),
            ("of a dtype that weights do not have", dtypes, ""),
        )
        if names
    ]
    if problems:
        raise JaxtuneError(f"{source.path}: does not fit its config: " + "; ".join(problems))
    return ignored


def _hint(missing: list[str], extra: list[str]) -> str:
    if missing == [HEAD]:
        return f'; if the head is tied to the embedding, set "{TIED}" to true in config.json'
    return closest(missing[0], extra) if missing else ""


def _some(names: list[str], most: int = 5) -> str:
    # Names are untrusted: they must not break the line or flood the terminal.
    shown = [n if n.isprintable() and len(n) < 400 else ascii(n[:100]) for n in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def load(
    definition: Definition,
    source: TensorSource,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> tuple[Tree, dict[str, str]]:
    """Streams a checkpoint into a tree of arrays.

    Each tensor is read once and transferred directly to its devices, in its final dtype or weight
    format; stacks are filled in place (see `staging`), so that the host holds one tensor at a time.
    With several processes each reads only what its own devices hold. Weights to quantize are read
    by whole rows, or in full if rows share scales (`Format.by_rows`).

    Args:
      definition: definition of the model.
      source: the checkpoint.
      mesh: mesh on which the arrays are placed.
      progress: shows a progress bar if loading takes more than two seconds.

    Returns:
      (tree of every weight of the base model, {ignored tensor: reason}).

    Raises:
      JaxtuneError: tensors are missing, unknown, of the wrong shape or dtype, or not finite.
    """
    ignored = check_names(definition, source)
    check_experts(definition, mesh.shape)
    for line in undivided(definition, mesh.shape):
        logger.warning("%s", line)
    leaves = definition.in_checkpoint()
    stacks = {path: _Stack(leaf, path, source, mesh) for path, leaf in leaves.items()}
    staging = Staging(max(stack.staged() for stack in stacks.values()))
    tree: dict[tuple[str, ...], Any] = {}
    rounds = sum(len(stack.rounds) for stack in stacks.values())
    with track(rounds, "loading weights", progress) as advance:
        for path, stack in stacks.items():
            tree[path] = stack.load(staging, advance)
    size = sum(stack.bytes_read for stack in stacks.values())
    logger.debug("process %d: %d bytes of weights", jax.process_index(), size)
    return unflatten(tree), ignored


class _Stack:
    """A leaf while it is loaded: a plain array, or the parts of a quantized one.

    Attributes:
      rounds: order in which its tensors are loaded.
      bytes_read: number of bytes of the checkpoint that this process has read.
    """

    def __init__(self, leaf: Leaf, path: Path, source: TensorSource, mesh: Mesh):
        self._leaf, self._source = leaf, source
        self._names = layer_names(path, leaf.declaration)
        self._lead = len(leaf.declaration.stack_shape)
        self._like = leaf.abstract(mesh)
        self._parts = {"": self._like} if leaf.format is None else self._like.parts
        # Tensors of a stack may be stored in different dtypes, but the array of a round has one.
        dtypes = {source.dtype(name) for name in self._names}
        self._read_as = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        first = next(iter(self._parts.values()))
        self.rounds = Rounds.of(first.shape, self._lead, first.sharding)
        self.bytes_read = 0

    def _round_shape(self, part: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return (*self.rounds.shares, *part.shape[self._lead :])

    def _staged_as(self, part: jax.ShapeDtypeStruct) -> np.dtype:
        return self._read_as if self._leaf.format is None else np.dtype(part.dtype)

    def staged(self) -> int:
        """Returns the number of bytes that the staging buffer needs for this leaf."""
        return max(
            Staging.needed(self._round_shape(part), part.sharding, self._staged_as(part))
            for part in self._parts.values()
        )

    def load(self, staging: Staging, advance: Callable[[], None]) -> Any:
        """Fills every part in place, round by round, quantizing weights that have a format.

        Args:
          staging: the host buffer.
          advance: called after each round.

        Returns:
          The array of any shape, or a `QuantizedWeight`.
        """
        arrays = {
            key: jnp.zeros(part.shape, part.dtype, device=part.sharding) if self._lead else None
            for key, part in self._parts.items()
        }
        for place in self.rounds.places():
            for key, (part, fetch) in self._fetches(place).items():
                shape = self._round_shape(part)
                dtype = self._staged_as(part)
                copy_to = functools.partial(self._copy, place)
                value = staging.put(shape, dtype, self._lead, part.sharding, fetch, copy_to)
                stacked, at = arrays[key], np.array(place, np.int32)
                arrays[key] = (
                    copy(value, part.dtype)
                    if stacked is None
                    else fill(stacked, value, at, part.sharding)
                )
                # The buffer is overwritten next, so the transfer must be finished.
                jax.block_until_ready(arrays[key])
            advance()
        if self._leaf.format is None:
            return arrays[""]
        return dataclasses.replace(self._like, parts=arrays)

    def _fetches(self, place: tuple[int, ...]) -> dict[str, tuple[jax.ShapeDtypeStruct, Fetch]]:
        """Returns the abstract array and the fetch function of each part, for one round.

        A quantized weight is encoded once per share; its parts are then cut from the result.
        """
        if self._leaf.format is None:
            return {"": (self._like, functools.partial(self._read, place))}
        rows = self._rows
        encoded = {share: self._encode(place, share, needed) for share, needed in rows.items()}
        return {
            key: (part, functools.partial(self._cut, key, encoded, rows))
            for key, part in self._parts.items()
        }

    def _name(self, place: tuple[int, ...], share: tuple[int, ...]) -> str:
        return self._names[self.rounds.index(place, share)]

    def _read(
        self, place: tuple[int, ...], share: tuple[int, ...], box: tuple[slice, ...]
    ) -> np.ndarray:
        value = self._source.read(self._name(place, share), box[0] if box else ALL)
        value = value[(slice(None), *box[1:])] if box else value
        self.bytes_read += value.nbytes
        return value

    def _copy(
        self, place: tuple[int, ...], share: tuple[int, ...], target: np.ndarray, value: np.ndarray
    ) -> None:
        if self._leaf.format is not None:
            np.copyto(target, value)  # checked when it was encoded
            return
        name = self._name(place, share)
        copy_finite(target, value, name, self._source.where(name), self._like.dtype)

    @functools.cached_property
    def _rows(self) -> dict[tuple[int, ...], slice]:
        """Rows of a weight that must be encoded for each share on this process's devices."""
        form, matrix = self._leaf.format, as_matrix(self._leaf.declaration.shape)
        assert form is not None
        found: dict[tuple[int, ...], list[Range]] = {}
        for key, part in self._parts.items():
            shape, axes = self._round_shape(part), form.parts(matrix)[key].axes
            for share, box in boxes_of_shares(shape, self._lead, part.sharding).items():
                needed = box[axes.index(0)] if form.by_rows(matrix) else (0, matrix[0])
                found.setdefault(share, []).append(needed)
        return {
            share: slice(min(first for first, _ in ranges), max(last for _, last in ranges))
            for share, ranges in found.items()
        }

    def _encode(
        self, place: tuple[int, ...], share: tuple[int, ...], rows: slice
    ) -> dict[str, np.ndarray]:
        assert self._leaf.format is not None
        name = self._name(place, share)
        columns = as_matrix(self._leaf.declaration.shape)[1]
        count = rows.stop - rows.start
        self.bytes_read += count * columns * self._source.dtype(name).itemsize
        return read_quantized(self._source, name, self._leaf.format, rows)

    def _cut(
        self,
        key: str,
        encoded: Mapping[tuple[int, ...], Mapping[str, np.ndarray]],
        rows: Mapping[tuple[int, ...], slice],
        share: tuple[int, ...],
        box: tuple[slice, ...],
    ) -> np.ndarray:
        """Returns a box of a part of an encoded weight, whose row 0 is the first encoded row.

        The box counts rows of the whole weight, so its slice along the axis of rows is shifted.
        """
        assert self._leaf.format is not None
        matrix = as_matrix(self._leaf.declaration.shape)
        axes, first = self._leaf.format.parts(matrix)[key].axes, rows[share].start
        shifted = (
            slice(bounds.start - first, bounds.stop - first) if axis == 0 else bounds
            for axis, bounds in zip(axes, box, strict=True)
        )
        return encoded[share][key][tuple(shifted)]
