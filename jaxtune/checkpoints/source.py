"""Where checkpoint tensors come from: the interface that every file format offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtune.layers.tree import Tree, flatten, layer_names
from jaxtune.models.definition import Definition


class TensorSource(Protocol):
    """The tensors of a checkpoint, under their Hugging Face names.

    Attributes:
      path: the directory or file.
      config: the content of config.json.
    """

    path: Path
    config: dict[str, Any]

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`; memory-mapped where the format allows it."""
        ...

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for error messages."""
        ...


class TrainedSource:
    """A checkpoint with some of its tensors replaced by those that a run has trained."""

    def __init__(self, source: TensorSource, definition: Definition, trained: Tree):
        """Finds the trained arrays by their Hugging Face names.

        Args:
          source: the checkpoint that the run started from.
          definition: of the run's model.
          trained: its trainables, all of the base model.
        """
        self._source = source
        self.path, self.config = source.path, source.config
        self._trained: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        for path, value in flatten(trained):
            declared = definition.leaves[path].declaration
            for part, name in enumerate(layer_names(path, declared)):
                place = np.unravel_index(part, declared.stack_shape)
                self._trained[name] = (value, place)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives: float32 for what was trained."""
        return np.dtype(np.float32) if name in self._trained else self._source.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`."""
        if name not in self._trained:
            return self._source.read(name)
        value, place = self._trained[name]
        return np.asarray(value[place])

    def where(self, name: str) -> str:
        """Returns the file that the checkpoint has a tensor in."""
        return self._source.where(name)
