"""Where checkpoint tensors come from: the interface that every file format offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtune.errors import JaxtuneError
from jaxtune.quant import Format

ALL = slice(None)  # of a tensor's rows


class TensorFile(Protocol):
    """One file of tensors.

    Attributes:
      path: of the file.
    """

    path: Path

    def names(self) -> list[str]:
        """Returns the names of the tensors in the file."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype."""
        ...

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or some rows of one that has dimensions.

        It is read-only and in C order.
        """
        ...


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

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or some rows of one that has dimensions.

        It is memory-mapped where the file format allows it.
        """
        ...

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns a tensor's parts if it is stored in just this format, else None.

        Their shapes are those that the format's `parts` gives.
        """
        ...

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for error messages."""
        ...


class WrappedSource:
    """A checkpoint that hands everything on to another; subclasses override what they change.

    Attributes:
      path: directory or file.
      config: content of config.json.
    """

    def __init__(self, source: TensorSource):
        self._source = source
        self.path: Path = source.path
        self.config: dict[str, Any] = source.config

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._source.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of the array that `read` returns."""
        return self._source.dtype(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it."""
        return self._source.read(name, rows)

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns a tensor's parts, of the format's shapes, if it is stored in this very format."""
        return self._source.read_parts(name, form)

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for error messages."""
        return self._source.where(name)


def refuse_pointer(path: Path) -> None:
    """Refuses the few lines of text that Git leaves in place of a large file.

    Raises:
      JaxtuneError: a pointer of Git LFS.
    """
    with path.open("rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            raise JaxtuneError(f"{path}: is a Git LFS pointer, not the file: run git lfs pull")
