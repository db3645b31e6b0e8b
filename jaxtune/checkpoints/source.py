"""Where checkpoint tensors come from: the interface that every file format offers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxtune.quant import Format

ALL = slice(None)  # of a tensor's rows


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
