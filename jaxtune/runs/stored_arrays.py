"""Reading parts of the arrays of a saved step, without the optimizer's and without whole stacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from jaxtune.errors import JaxtuneError, closest


class StoredArray:
    """An array on disk; indexing it reads that part.

    Attributes:
      shape: shape of the array.
      dtype: dtype of the array.
      chunk: shape of the pieces in which it is stored.
    """

    def __init__(self, state: Path, name: str):
        """Opens an array.

        Args:
          state: directory that Orbax has written.
          name: keys of the array in the saved tree, joined by dots.
        """
        settings = json.loads((state / "_METADATA").read_text(encoding="utf-8"))
        files: dict[str, Any] = {"driver": "file", "path": f"{state}/"}
        if settings.get("use_ocdbt"):
            files = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        else:
            files["path"] += f"{name}/"
        driver = "zarr3" if settings.get("use_zarr3") else "zarr"
        self._store = tensorstore.open({"driver": driver, "kvstore": files}, read=True).result()
        self.shape = tuple(self._store.shape)
        self.dtype = self._store.dtype.numpy_dtype
        self.chunk = tuple(self._store.chunk_layout.read_chunk.shape or ())

    def __getitem__(self, part: Any) -> np.ndarray:
        """Reads a part, of the shape that indexing a NumPy array gives."""
        return np.asarray(self._store[part].read().result())


def open_arrays(state: Path, like: Mapping[str, Any]) -> dict[str, StoredArray]:
    """Opens arrays of a saved tree.

    Args:
      state: directory that Orbax has written.
      like: arrays or abstract arrays by their keys, joined by dots.

    Raises:
      JaxtuneError: an array is missing or has another shape or dtype.
    """
    found: dict[str, StoredArray] = {}
    for name, expected in like.items():
        try:
            found[name] = StoredArray(state, name)
        except ValueError as error:
            names = _names(state)
            if name in names:
                raise
            raise JaxtuneError(f"{state}: missing {name}{closest(name, names)}") from error
        ours, theirs = (f"{np.dtype(a.dtype)}{[*a.shape]}" for a in (found[name], expected))
        if ours != theirs:
            raise JaxtuneError(f"{state}: {name} is {ours}, but the run needs {theirs}")
    return found


def _names(state: Path) -> list[str]:
    settings = json.loads((state / "_METADATA").read_text(encoding="utf-8"))
    return [
        ".".join(str(key["key"]) for key in entry["key_metadata"])
        for entry in settings["tree_metadata"].values()
    ]


def load_array(stored: StoredArray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads an array of any shape onto its devices; each process reads the parts it holds."""
    assert like.sharding is not None
    return jax.make_array_from_callback(like.shape, like.sharding, stored.__getitem__)
