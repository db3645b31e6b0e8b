"""Checkpoints with the values of some tensors replaced, by a method's edit or by training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtune.adapters.method import BaseEdit
from jaxtune.checkpoints.finite import check_finite
from jaxtune.checkpoints.source import ALL, TensorSource, WrappedSource
from jaxtune.layers.tree import Tree, flatten, layer_names
from jaxtune.models.definition import Definition
from jaxtune.parallel.host import read_part
from jaxtune.quant import Format


class OverlaySource(WrappedSource):
    """A checkpoint with the values of some tensors replaced by float32 ones of the same shapes."""

    def __init__(self, source: TensorSource, values: Mapping[str, Callable[[], np.ndarray]]):
        """Wraps a checkpoint.

        Args:
          source: the checkpoint.
          values: functions that return the new value, by tensor name.
        """
        super().__init__(source)
        self._values = values
        self._last: tuple[str, np.ndarray] | None = None

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of the result of `read`: float32 for replaced tensors."""
        return np.dtype(np.float32) if name in self._values else self._source.dtype(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it."""
        if name not in self._values:
            return self._source.read(name, rows)
        value = self._value(name)
        return value[rows] if value.ndim else value

    def _value(self, name: str) -> np.ndarray:
        # A tensor may be read in several chunks of rows; its value is computed once. The previous
        # one is freed first.
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._values[name]()
        return self._last[1]

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns the parts, of the format's shapes, or None; always None if replaced."""
        return None if name in self._values else self._source.read_parts(name, form)


def with_base_edit(source: TensorSource, edit: BaseEdit) -> OverlaySource:
    """Returns a checkpoint with a method's edit applied, in float32 and before quantization."""

    def value(name: str) -> np.ndarray:
        weight = source.read(name)
        check_finite(weight, name, source.where(name))  # before any decomposition of it
        return edit(name, weight.astype(np.float32))

    return OverlaySource(source, {name: functools.partial(value, name) for name in edit.names})


def with_trained_weights(
    source: TensorSource, definition: Definition, trainable: Tree
) -> OverlaySource:
    """Returns a checkpoint with the weights that a run has trained.

    Args:
      source: the checkpoint from which the run started.
      definition: definition of the run's model.
      trainable: tree of trained arrays, all of them weights of the base model; stacks are read one
        layer (and expert) at a time.
    """

    def value(stack: Any, place: tuple[Any, ...]) -> np.ndarray:
        return read_part(stack, place).astype(np.float32, copy=False)

    values: dict[str, Callable[[], np.ndarray]] = {}
    # A part is one layer (and expert) of a stack, under the name that the checkpoint has for it.
    for path, stack in flatten(trainable):
        declared = definition.leaves[path].declaration
        for part, name in enumerate(layer_names(path, declared)):
            place = np.unravel_index(part, declared.stack_shape)
            values[name] = functools.partial(value, stack, place)
    return OverlaySource(source, values)
