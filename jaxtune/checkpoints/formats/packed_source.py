"""Base class of checkpoints that store a quantized weight as several tensors: codes, scales, …"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from jaxtune.checkpoints.finite import check_finite
from jaxtune.checkpoints.quantize import CHUNK
from jaxtune.checkpoints.source import ALL, TensorSource, WrappedSource
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.host import host_device
from jaxtune.quant import Format
from jaxtune.quant.codes import pack, packed_size, unpack

# Rows or columns that share a scale: decoding repeats each scale as often.
LARGEST_GROUP = 2**16

_pack = jax.jit(pack)
_unpack = jax.jit(unpack, static_argnums=1)


class Specified(NamedTuple):
    """The required shape and dtype of a tensor on disk.

    Attributes:
      shape: required shape.
      dtypes: names of the allowed dtypes.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


class PackedSource(WrappedSource, abc.ABC):
    """A checkpoint with packed weights, read as one with plain float32 weights.

    A subclass defines which tensors make up a weight, and decodes them.
    """

    def __init__(
        self,
        source: TensorSource,
        form: Format,
        endings: Mapping[str, str],
        optional: tuple[str, ...] = (),
    ):
        """Groups the tensors of each weight and checks them; codes and scales are not read.

        Args:
          source: the tensors on disk.
          form: weight format of the quantized weights.
          endings: suffix after the module's name, for each tensor of a weight; codes first.
          optional: keys of tensors that a weight may lack.

        Raises:
          JaxtuneError: a tensor is missing, or has the wrong shape or dtype.
        """
        super().__init__(source)
        self.form = form
        self._tensors: dict[str, dict[str, str]] = {}
        self._finite: set[str] = set()  # tensors that have been checked
        present = set(source.names())
        for module in _modules(source, endings):
            weight = module + ".weight"
            tensors = {key: module + ending for key, ending in endings.items()}
            missing = [key for key, name in tensors.items() if name not in present]
            needed = [tensors[key] for key in missing if key not in optional]
            if needed:
                raise JaxtuneError(
                    f'{source.path}: {weight} is stored as {form.name} but has no "{needed[0]}"'
                )
            # Some formats keep the codes under another name than "….weight".
            if weight in present and weight not in tensors.values():
                raise JaxtuneError(
                    f"{source.where(weight)}: {weight} is stored both plain and as {form.name}"
                )
            self._tensors[weight] = {k: n for k, n in tensors.items() if k not in missing}
        taken = {name for tensors in self._tensors.values() for name in tensors.values()}
        self._names = [*self._tensors, *(name for name in source.names() if name not in taken)]
        for weight in self._tensors:
            self._check(weight)

    def _check(self, weight: str) -> None:
        for key, specified in self._specified(weight).items():
            name = self._tensors[weight][key]
            shape, dtype = self._source.shape(name), str(self._source.dtype(name))
            if shape != specified.shape or dtype not in specified.dtypes:
                kinds = " or ".join(specified.dtypes)
                wanted = f"{kinds} {list(specified.shape)}"
                raise self._error(weight, key, f"is {dtype} {list(shape)}, not {wanted}")

    def _error(self, weight: str, key: str, problem: str) -> JaxtuneError:
        """Returns the error about one tensor of a weight."""
        name = self._tensors[weight][key]
        return JaxtuneError(f'{self._source.where(name)}: "{name}" {problem}')

    def _stored(self, weight: str, key: str) -> np.ndarray:
        """Returns one tensor of a weight as stored on disk."""
        name = self._tensors[weight][key]
        value = self._source.read(name)
        # Codes may be large and are checked with the values that are decoded from them.
        if key != "codes" and name not in self._finite:
            check_finite(value, name, self._source.where(name))
            self._finite.add(name)
        return value

    @abc.abstractmethod
    def _specified(self, weight: str) -> dict[str, Specified]:
        """Returns the required shapes and dtypes of a weight's tensors."""

    @abc.abstractmethod
    def _shape(self, weight: str) -> tuple[int, int]:
        """Returns the shape of a quantized weight."""

    @property
    def _row_multiple(self) -> int:
        """Number of rows that have to be decoded together."""
        return 1

    @abc.abstractmethod
    def _decode(self, weight: str, first: int, last: int) -> np.ndarray:
        """Returns some rows of a quantized weight, float32 [last − first, in]."""

    @abc.abstractmethod
    def _parts(self, weight: str) -> dict[str, np.ndarray] | None:
        """Returns a quantized weight as the parts of `form`; None if that would lose precision."""

    def names(self) -> list[str]:
        """Returns the names of all weights, without those of scales and other companion tensors."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._shape(name) if name in self._tensors else super().shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype of the result of `read`: float32 for a quantized weight."""
        return np.dtype(np.float32) if name in self._tensors else super().dtype(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it, dequantized if quantized."""
        if name not in self._tensors:
            return super().read(name, rows)
        height, columns = self._shape(name)
        start, stop, _ = rows.indices(height)
        values = np.empty((stop - start, columns), np.float32)
        for first, last in row_chunks(start, stop, columns, self._row_multiple):
            values[first - start : last - start] = self._decode(name, first, last)
        return values

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns the parts, of the format's shapes, or None; see `TensorSource.read_parts`."""
        return self._parts(name) if name in self._tensors and form == self.form else None

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor, or the codes of a weight."""
        tensors = self._tensors.get(name)
        return self._source.where(name if tensors is None else next(iter(tensors.values())))


def _modules(source: TensorSource, endings: Mapping[str, str]) -> list[str]:
    """Returns the modules that have any tensor that only quantized weights have."""
    distinctive = tuple(ending for ending in endings.values() if ending != ".weight")
    found: dict[str, None] = {}
    for name in source.names():
        for ending in distinctive:
            if name.endswith(ending):
                found[name.removesuffix(ending)] = None
    return list(found)


def row_chunks(start: int, stop: int, columns: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yields the bounds (first, last + 1) of chunks of rows.

    All chunks but the first begin at a multiple of 2 and of `multiple`. The 2 keeps the two 4-bit
    codes of a byte in one chunk even if rows have an odd number of columns; `multiple` does the
    same for blocks of rows.
    """
    multiple = math.lcm(2, multiple)
    step = max(CHUNK // columns // multiple, 1) * multiple
    first = start
    while first < stop:
        last = min((first // step + 1) * step, stop)
        yield first, last
        first = last


def pack_rows(codes: Callable[[int, int], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Packs 4-bit codes into the layout of `jaxtune.quant.codes`: uint8 [packed_size(in), out].

    Args:
      codes: returns the codes of rows first … last − 1, uint8 [rows, in], each below 16.
      shape: (out, in).
    """
    rows, columns = shape
    packed, device = np.empty((packed_size(columns), rows), np.uint8), host_device()
    for first, last in row_chunks(0, rows, columns):
        packed[:, first:last] = _pack(jax.device_put(codes(first, last), device))
    return packed


def unpack_rows(packed: np.ndarray, shape: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
    """Inverts `pack_rows`: yields (first row, codes uint8 [rows, in]) in chunks of rows."""
    rows, columns = shape
    device = host_device()
    for first, last in row_chunks(0, rows, columns):
        chunk = jax.device_put(np.ascontiguousarray(packed[:, first:last]), device)
        yield first, np.asarray(_unpack(chunk, columns)).T
