"""Safetensors files: read through a memory map and written in shards.

Source: the specification, https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxtune.checkpoints.source import ALL, byte_range, check_length, refuse_pointer
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import parse_json

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

_MAX_DIMENSIONS = 64  # of a NumPy array


class SafetensorsFile:
    """One safetensors file; its tensors are views of a memory map.

    The safetensors library validates the header before any of its offsets is used.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          JaxtuneError: the file is missing, truncated or not a valid safetensors file.
        """
        self.path = path
        self.on_read: Callable[[int, int], None] | None = None
        if not path.is_file():
            raise JaxtuneError(f"{path}: no such file")
        refuse_pointer(path)
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise JaxtuneError(f"{path}: not a valid safetensors file: {error}") from error
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = parse_json(file.read(length), str(path))
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if len(entry["shape"]) > _MAX_DIMENSIONS:
                raise JaxtuneError(
                    f"{path}: tensor {name[:100]!a} has {len(entry['shape'])} dimensions, more "
                    f"than {_MAX_DIMENSIONS}"
                )
        self._start = 8 + length
        self._entries = header

    def names(self) -> list[str]:
        """Returns the names of the tensors in the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype.

        Raises:
          JaxtuneError: an unsupported dtype.
        """
        kind = self._entries[name]["dtype"]
        if kind not in DTYPES:
            raise JaxtuneError(f'{self.path}: tensor "{name}" has the unsupported dtype {kind}')
        return DTYPES[kind]

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or a slice of its rows.

        The array is a read-only view of the file. `rows` is ignored for a scalar.
        """
        check_length(self.path, self.mapped)
        start, stop = self._entries[name]["data_offsets"]
        dtype = self.dtype(name)
        if self.on_read is not None:
            first, last = byte_range(self.shape(name), stop - start, rows)
            self.on_read(self._start + start + first, self._start + start + last)
        flat = np.frombuffer(
            self.mapped, dtype, (stop - start) // dtype.itemsize, self._start + start
        )
        value = flat.reshape(self.shape(name))
        return value[rows] if value.ndim else value


def read_all(path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a file by name, of any shape, as views of its memory map."""
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.names()}


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors of any shape to one file that PyTorch's tools read.

    Raises:
      OSError: the disk is full or cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


class Pending(NamedTuple):
    """A tensor that is computed when it is written, so that a shard takes no memory.

    Attributes:
      shape: shape of the value.
      dtype: dtype of the value.
      make: computes the value.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def _write_pending(path: Path, tensors: Mapping[str, Pending], advance: Callable[[], None]) -> None:
    """Writes tensors one at a time, each at its offset in the header.

    Offsets are assigned by decreasing item size, but values are computed in the given order, in
    which the parts of one weight are adjacent.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide dtypes first: PyTorch requires each tensor to be aligned to its item size.
    for name in sorted(tensors, key=lambda name: -np.dtype(tensors[name].dtype).itemsize):
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": kinds[np.dtype(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            value = np.ascontiguousarray(tensor.make())
            assert (value.nbytes, value.dtype) == (tensor.nbytes, np.dtype(tensor.dtype)), name
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(value.reshape(-1).view(np.uint8).data)
            advance()


def write_sharded(
    directory: Path,
    tensors: Iterable[tuple[str, Pending]],
    shard_bytes: int,
    advance: Callable[[], None] = lambda: None,
) -> list[str]:
    """Writes tensors of any shape into files of at most `shard_bytes`, and the index.

    Args:
      directory: an existing directory.
      tensors: (name, tensor) pairs, computed one at a time in this order.
      shard_bytes: maximum size of a file in bytes; a single larger tensor gets a file of its own.
      advance: called after each tensor.

    Returns:
      The names of the files written. A single file is named model.safetensors and has no index.
    """
    parts: list[Path] = []
    where: dict[str, int] = {}
    shard: dict[str, Pending] = {}
    held = total = 0

    # Files are named by their number and the number of files, which is known only at the end.
    def flush() -> None:
        nonlocal held
        parts.append(directory / f"part-{len(parts)}.safetensors")
        _write_pending(parts[-1], shard, advance)
        shard.clear()
        held = 0

    for name, value in tensors:
        if shard and held + value.nbytes > shard_bytes:
            flush()
        shard[name], where[name] = value, len(parts)
        held, total = held + value.nbytes, total + value.nbytes
    flush()
    count = len(parts)
    if count == 1:
        names = ["model.safetensors"]
    else:
        names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: names[part] for name, part in where.items()},
        }
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    for part, name in zip(parts, names, strict=True):
        part.rename(directory / name)
    return names
