"""The interface through which every file format provides the tensors of a checkpoint."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtune.errors import JaxtuneError
from jaxtune.quant import Format

ALL = slice(None)  # all rows of a tensor


class ReadFile(Protocol):
    """A file whose tensors are read.

    Attributes:
      path: path of the file.
      on_read: called with the first byte and the last byte + 1 of every range before it is read.
    """

    path: Path
    on_read: Callable[[int, int], None] | None

    @property
    def mapped(self) -> mmap.mmap | None:
        """Memory map of the whole file; None if tensors are read in another way."""
        ...


class TensorFile(ReadFile, Protocol):
    """One file of tensors."""

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
        """Returns a tensor of the shape `shape(name)`, or a slice of its rows.

        `rows` is ignored for a scalar.
        The array is read-only and in C order.
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
        """Returns the dtype of the array that `read` returns."""
        ...

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or a slice of its rows.

        `rows` is ignored for a scalar.
        The array is memory-mapped if the file format allows it.
        """
        ...

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns a tensor's parts if it is stored in exactly this format, else None.

        The shapes are those of `Format.parts`.
        """
        ...

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for error messages."""
        ...

    def files(self) -> Sequence[ReadFile]:
        """Returns the files from which tensors are read."""
        ...


class WrappedSource:
    """A checkpoint that delegates to another one; subclasses override what they change.

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
        """Returns the parts, of the format's shapes, or None; see `TensorSource.read_parts`."""
        return self._source.read_parts(name, form)

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, for error messages."""
        return self._source.where(name)

    def files(self) -> Sequence[ReadFile]:
        """Returns the files from which tensors are read."""
        return self._source.files()


def refuse_pointer(path: Path) -> None:
    """Checks that a file is not a Git LFS pointer, the text that stands in for a large file.

    Raises:
      JaxtuneError: the file is a pointer.
    """
    with path.open("rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            raise JaxtuneError(f"{path}: is a Git LFS pointer, not the file: run git lfs pull")


def byte_range(shape: tuple[int, ...], size: int, rows: slice) -> tuple[int, int]:
    """Returns the first byte and the last byte + 1 of rows of a tensor in C order.

    Args:
      shape: shape of the tensor.
      size: its size in bytes.
      rows: rows to read; ignored for a scalar.
    """
    if not shape or not size:
        return 0, size
    start, stop, _ = rows.indices(shape[0])
    row = size // shape[0]
    return start * row, max(start, stop) * row


def check_length(path: Path, content: mmap.mmap) -> None:
    """Checks that a mapped file is as long as when it was opened.

    The bytes beyond the end of a file that has become shorter cannot be read: the operating system
    ends the process with SIGBUS.

    Raises:
      JaxtuneError: the file is shorter.
    """
    if content.size() < len(content):
        raise truncated(path)


def truncated(path: Path) -> JaxtuneError:
    """Returns the error about a file that has become shorter since it was opened."""
    return JaxtuneError(f"{path}: has become shorter since it was opened; is it being replaced?")
