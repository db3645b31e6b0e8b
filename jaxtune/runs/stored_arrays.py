"""Reading parts of the arrays of a saved step, without the optimizer's and without whole stacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from jaxtune.errors import JaxtuneError, closest
from jaxtune.strict_json import entry, expect, read_object


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
        settings = read_object(state / "_METADATA")
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


def read_metadata(checkpointer: Any, state: Path) -> Any:
    """Returns the tree of a directory that Orbax has written, with the shape and dtype of arrays.

    Raises:
      JaxtuneError: the tree cannot be read.
    """
    for name in ("_METADATA", "_CHECKPOINT_METADATA"):
        read_object(state / name)  # raises where Orbax would fail without a reason
    try:
        metadata = checkpointer.metadata(state).item_metadata
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # Orbax checks no types
        raise JaxtuneError(f"{state}: its list of arrays is damaged: {error!r}") from error
    if metadata is None:
        raise JaxtuneError(f"{state}: its list of arrays is damaged")
    return metadata.tree


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
    path = state / "_METADATA"
    leaves = entry(read_object(path), "tree_metadata", dict, path).values()
    keys = [entry(expect(leaf, dict, str(path)), "key_metadata", list, path) for leaf in leaves]
    return [".".join(str(expect(key, dict, str(path)).get("key")) for key in each) for each in keys]


def load_array(stored: StoredArray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads an array of any shape onto its devices; each process reads the parts it holds."""
    assert like.sharding is not None
    return jax.make_array_from_callback(like.shape, like.sharding, stored.__getitem__)
