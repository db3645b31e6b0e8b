"""The weights of a checkpoint to write, one at a time: from a model in memory or a checkpoint."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.adapters.merge import Frozen, WeightEdit, decoded, merged_array
from jaxtune.checkpoints.finite import check_finite
from jaxtune.checkpoints.overlay import OverlaySource
from jaxtune.checkpoints.quantize import read_quantized
from jaxtune.checkpoints.requantize import Requantizer
from jaxtune.checkpoints.source import TensorSource
from jaxtune.layers.tree import Path, Tree, flatten, layer_names
from jaxtune.models.definition import Definition
from jaxtune.parallel.host import read_part


class Values(abc.ABC):
    """The weights of a model, with edits merged.

    A weight is identified by the path of its leaf, its flat index in the leaf's stack (`part`) and
    its Hugging Face name.
    """

    def __init__(
        self,
        definition: Definition,
        edits: Mapping[str, WeightEdit],
        requantizer: Requantizer | None = None,
    ):
        """Initializes the values; nothing is read or computed yet.

        Args:
          definition: definition of the model.
          edits: edits by name; see `jaxtune.adapters.merge.edits`.
          requantizer: quantizes the merged weights that are written quantized.
        """
        self._leaves, self._edits = definition.leaves, edits
        self._requantizer = Requantizer() if requantizer is None else requantizer
        # The parts of a weight are written in succession, so one result is kept.
        self._parts = functools.lru_cache(maxsize=1)(self._quantized)

    @abc.abstractmethod
    def frozen(self, path: Path, part: int, name: str) -> Any:
        """Returns a weight without its edit, in host memory.

        It is an array of the declared shape, or a `QuantizedWeight` of one layer (and expert).
        """

    def plain(self, path: Path, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight of the declared shape.

        Args:
          path: path of its leaf.
          part: index in the stack.
          name: Hugging Face name.
          dtype: dtype of an edited or dequantized weight; others keep their own.
        """
        if name not in self._edits:
            return decoded(self.frozen(path, part, name), dtype)
        merged = self._edits[name](self._module(path, part, name))
        return merged_array(merged, self._leaves[path].declaration.shape, dtype)

    def quantized(self, path: Path, part: int, name: str, key: str) -> np.ndarray:
        """Returns the part `key` of a quantized weight, with the shape of `Format.parts`.

        An edited weight is quantized again.
        """
        return self._parts(path, part, name)[key]

    def _quantized(self, path: Path, part: int, name: str) -> dict[str, np.ndarray]:
        if name not in self._edits:
            return self.frozen(path, part, name).parts
        frozen = self._module(path, part, name)
        return self._requantizer(name, frozen, self._edits[name](frozen))

    def _module(self, path: Path, part: int, name: str) -> Frozen:
        """Returns the weight and bias of the module to which an array belongs."""
        module = name.rpartition(".")[0]
        arrays = {
            kind: self.frozen((*path[:-1], kind), part, f"{module}.{kind}")
            for kind in ("weight", "bias")
            if (*path[:-1], kind) in self._leaves
        }
        return Frozen(**arrays)


class TreeValues(Values):
    """The weights of a model in memory, on one device or sharded over many.

    With several processes, every process must ask for the same weights in the same order.
    """

    def __init__(
        self,
        definition: Definition,
        tree: Tree,
        edits: Mapping[str, WeightEdit],
        requantizer: Requantizer | None = None,
    ):
        """Initializes the values.

        Args:
          definition: definition of the model.
          tree: every weight of the base model.
          edits: see `Values`.
          requantizer: see `Values`.
        """
        super().__init__(definition, edits, requantizer)
        self._values = dict(flatten(tree))

    def frozen(self, path: Path, part: int, name: str) -> Any:
        """Reads one layer (and expert), as a view if it is in host memory."""
        place = np.unravel_index(part, self._leaves[path].declaration.stack_shape)
        return jax.tree.map(lambda value: read_part(value, place), self._values[path])


class SourceValues(Values):
    """The weights of another checkpoint, in the dtypes and weight formats of a definition."""

    def __init__(
        self,
        definition: Definition,
        source: TensorSource,
        edits: Mapping[str, WeightEdit] | None = None,
        requantizer: Requantizer | None = None,
    ):
        """Initializes the values.

        Args:
          definition: definition of the model.
          source: the checkpoint to read.
          edits: see `Values`.
          requantizer: see `Values`.
        """
        super().__init__(definition, edits or {}, requantizer)
        self._source = source

    def frozen(self, path: Path, part: int, name: str) -> Any:
        """Reads a weight as a model in memory would hold it, as a view of the file if possible."""
        leaf = self._leaves[path]
        if leaf.format is None:
            value = self._source.read(name)
            check_finite(value, name, self._source.where(name), leaf.dtype)
            return value.astype(leaf.dtype, copy=False)
        parts = read_quantized(self._source, name, leaf.format)
        return dataclasses.replace(leaf.abstract(), parts=parts)


def merged_source(
    source: TensorSource, definition: Definition, edits: Mapping[str, WeightEdit]
) -> OverlaySource:
    """Returns a checkpoint with edits merged, as a checkpoint to read; nothing is written.

    Args:
      source: the checkpoint.
      definition: definition of the model, whose weight formats are applied and decoded again.
      edits: see `Values`.
    """
    values, replaced = SourceValues(definition, source, edits), {}

    def value(path: Path, part: int, name: str, dtype: Any) -> np.ndarray:
        return values.plain(path, part, name, dtype).astype(np.float32)

    for path, leaf in definition.in_checkpoint().items():
        for part, name in enumerate(layer_names(path, leaf.declaration)):
            replaced[name] = functools.partial(value, path, part, name, leaf.dtype)
    return OverlaySource(source, replaced)
