"""Reads the header of a GGUF file: metadata and the location of each tensor.

``gguf.GGUFReader`` is not used, because a damaged or hostile file must be rejected with a clear
message before anything is allocated, and because that reader keeps two arrays for every word of the
vocabulary.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
)

from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import open_regular

_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS of ggml
_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "|b1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class TensorInfo(NamedTuple):
    """Location of a tensor in its file.

    Attributes:
      shape: dimensions in NumPy's order, slowest first.
      block_type: packing of the values.
      offset: first byte, counted from the start of the file.
      size: size in bytes.
    """

    shape: tuple[int, ...]
    block_type: GGMLQuantizationType
    offset: int
    size: int


class Header(NamedTuple):
    """The header of a GGUF file: metadata by key, tensors by GGUF name."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """Reads typed values from a buffer in order; raises at its end."""

    def __init__(self, path: Path, buffer: mmap.mmap):
        self.path = path
        self.buffer = buffer
        self.position = 0

    def take(self, size: int) -> int:
        """Moves past `size` bytes and returns where they start."""
        start = self.position
        if size > len(self.buffer) - start:
            raise JaxtuneError(f"{self.path}: truncated or damaged GGUF header at byte {start}")
        self.position += size
        return start

    def integer(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.buffer, self.take(struct.calcsize(form)))
        return value

    def text(self) -> str:
        size = self.integer("<Q")
        start = self.take(size)
        try:
            return self.buffer[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise JaxtuneError(f"{self.path}: text at byte {start} is not UTF-8") from None

    def value(self, value_type: int) -> Any:
        if value_type == GGUFValueType.STRING:
            return self.text()
        if value_type == GGUFValueType.ARRAY:
            item_type, count = self.integer("<I"), self.integer("<Q")
            if item_type == GGUFValueType.STRING:
                return [self.text() for _ in range(count)]
            return self.numbers(item_type, count)
        return self.numbers(value_type, 1)[0]

    def numbers(self, value_type: int, count: int) -> list:
        if value_type not in _SCALARS:
            raise JaxtuneError(
                f"{self.path}: unknown GGUF value type {value_type} before byte {self.position}"
            )
        dtype = np.dtype(_SCALARS[GGUFValueType(value_type)])
        start = self.take(dtype.itemsize * count)
        return np.frombuffer(self.buffer, dtype, count, start).tolist()


def _read_tensor_info(cursor: _Cursor, name: str) -> TensorInfo:
    """Reads one tensor's entry; `offset` is still relative to the start of the data."""
    path = cursor.path
    dimensions = cursor.integer("<I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise JaxtuneError(f'{path}: tensor "{name}" has {dimensions} dimensions')
    shape = tuple(cursor.integer("<Q") for _ in range(dimensions))[::-1]
    number, offset = cursor.integer("<I"), cursor.integer("<Q")
    try:
        block_type = GGMLQuantizationType(number)
    except ValueError:
        raise JaxtuneError(f'{path}: tensor "{name}" has unknown block type {number}') from None
    block_values, block_bytes = GGML_QUANT_SIZES[block_type]
    if shape[-1] % block_values:
        raise JaxtuneError(
            f'{path}: tensor "{name}" has rows of {shape[-1]} values, which is not a multiple of '
            f"{block_type.name}'s blocks of {block_values}"
        )
    return TensorInfo(shape, block_type, offset, math.prod(shape) // block_values * block_bytes)


def _read_header(cursor: _Cursor) -> Header:
    path = cursor.path
    if len(cursor.buffer) < 4 or cursor.integer("<I") != GGUF_MAGIC:
        raise JaxtuneError(f"{path}: not a GGUF file")
    version = cursor.integer("<I")
    if version not in _VERSIONS:
        raise JaxtuneError(f"{path}: GGUF version {version} (known: 2, 3, little-endian)")
    tensor_count, key_count = cursor.integer("<Q"), cursor.integer("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.integer("<I"))
    relative: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        name = cursor.text()
        if name in relative:
            raise JaxtuneError(f'{path}: tensor "{name}" occurs twice')
        relative[name] = _read_tensor_info(cursor, name)
    # Offsets of tensors count from the start of the data, the first aligned byte after the header.
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise JaxtuneError(f"{path}: general.alignment={alignment!r} is not a positive integer")
    data_start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, info in relative.items():
        tensors[name] = info._replace(offset=data_start + info.offset)
        end = tensors[name].offset + info.size
        if end > len(cursor.buffer):
            raise JaxtuneError(
                f'{path}: truncated: tensor "{name}" ends at byte {end}, the file at '
                f"{len(cursor.buffer)}"
            )
    return Header(metadata, tensors)


def read_header(path: str | Path) -> Header:
    """Reads and checks the header of a GGUF file.

    Args:
      path: a ``.gguf`` file, version 2 or 3, little-endian.

    Returns:
      Metadata (numbers, strings and lists of these) and the location of each tensor, which is
      checked to be inside the file.

    Raises:
      JaxtuneError: the file is missing, damaged, truncated or not a GGUF file.
    """
    path = Path(path)
    try:
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            return _read_header(_Cursor(path, data))
    except JaxtuneError:
        raise
    except ValueError as error:  # raised by mmap for an empty file
        raise JaxtuneError(f"{path}: not a GGUF file ({error})") from error
    except OSError as error:
        raise JaxtuneError(f"{path}: {error.strerror}") from error
