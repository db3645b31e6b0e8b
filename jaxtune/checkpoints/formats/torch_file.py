"""PyTorch's own checkpoints (``.bin``, ``.pt``), read through a memory map and without PyTorch.

Such a file is an uncompressed zip archive: ``<name>/data.pkl`` is a pickle that describes the
tensors (see `torch_pickle`), and ``<name>/data/<key>`` are the values of their storages. Several
tensors may share a storage, each with its own offset, shape and strides.

Source: ``torch/serialization.py``.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from jaxtune.checkpoints.formats.torch_names import STORAGES, Storage, TensorRecord
from jaxtune.checkpoints.formats.torch_pickle import ANOTHER_WAY, printable, read_state_dict
from jaxtune.checkpoints.formats.zip_directory import Member, read_directory
from jaxtune.checkpoints.source import ALL, byte_range, check_length, refuse_pointer
from jaxtune.errors import JaxtuneError

PICKLE_BYTES = 128 * 2**20
COPIED_BYTES = 16 * 2**20  # size of expanded views that a smaller file may have

_PLAIN = set(STORAGES.values()) - {"bfloat16"}
_NARROW = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
_NUMPY = {dtype.name: dtype for dtype in [np.dtype(each) for each in (*_PLAIN, *_NARROW)]}
_WRITE_AGAIN = "write it again with torch.save(torch.load(..., weights_only=True), ...)"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257


class _Entry(NamedTuple):
    """A tensor in the file: a NumPy array's dtype, shape, byte offset and byte strides."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of a copy."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Number of bytes from the first value to the end of the last in the file."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.strides, strict=True)
        return sum((length - 1) * stride for length, stride in steps) + self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the values are contiguous in C order and aligned in the file."""
        size = self.dtype.itemsize
        for length, stride in zip(self.shape[::-1], self.strides[::-1], strict=True):
            if length != 1 and stride != size:
                return False
            size *= length
        return self.offset % self.dtype.itemsize == 0


class TorchFile:
    """One file of `torch.save`; its tensors are views of a memory map.

    Nothing in the file is executed, and every offset, size and stride is checked before use.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          JaxtuneError: the file is missing or not a zip file with a state dict of plain tensors.
        """
        self.path = path
        self.on_read: Callable[[int, int], None] | None = None
        if not path.is_file():
            raise JaxtuneError(f"{path}: no such file")
        refuse_pointer(path)
        with path.open("rb") as file:
            _check_format(file.read(512), path)
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        members = read_directory(self.mapped, path)
        prefix = self._prefix(members)
        pickle = self._pickle(members[f"{prefix}data.pkl"])
        records = read_state_dict(self.mapped, pickle.start, pickle.size, path)
        storages: dict[str, Storage] = {}
        self._entries: dict[str, _Entry] = {}
        for name, record in records.items():
            key = record.storage.key
            if storages.setdefault(key, record.storage) != record.storage:
                self._refuse(
                    f'tensor "{name}": another tensor gives its storage another dtype or size'
                )
            self._entries[name] = self._entry(name, record, members.get(f"{prefix}data/{key}"))
        copied = sum(entry.nbytes for entry in self._entries.values() if not entry.contiguous)
        if copied > max(len(self.mapped), COPIED_BYTES):
            self._refuse("has overlapping views with more values than the file")

    def _refuse(self, problem: str) -> NoReturn:
        raise JaxtuneError(f"{self.path}: {problem}")

    def _prefix(self, members: dict[str, Member]) -> str:
        """Returns the common directory of the members, with a trailing slash."""
        pickles = [name for name in members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self._refuse(f"is a zip file with {len(pickles)} data.pkl, not a file of torch.save")
        prefix = pickles[0].removesuffix("data.pkl")
        for name in members:
            if name == f"{prefix}constants.pkl" or name.startswith(f"{prefix}code/"):
                self._refuse(
                    "is a TorchScript program: save its state dict, "
                    "torch.save(torch.jit.load(...).state_dict(), ...)"
                )
        if not all(member.plain for member in members.values()):
            self._refuse(
                "contains compressed or encrypted files, unlike files of torch.save: unpack it and "
                "zip it again without compression"
            )
        order = members.get(f"{prefix}byteorder")
        if order and self.mapped[order.start : order.start + min(order.size, 16)] != b"little":
            self._refuse(
                "was written on a big-endian machine (its byteorder is not little): load and save "
                "it with torch on a little-endian one"
            )
        return prefix

    def _pickle(self, member: Member) -> Member:
        """Checks the size and checksum of the pickle and returns it."""
        if member.size > PICKLE_BYTES:
            self._refuse(f"its pickle has {member.size} bytes, more than any state dict needs")
        with memoryview(self.mapped) as whole, whole[member.start :][: member.size] as content:
            crc = zlib.crc32(content)
        if member.crc not in (0, crc):
            self._refuse("is damaged: the checksum of its data.pkl is wrong")
        return member

    def _entry(self, name: str, record: TensorRecord, member: Member | None) -> _Entry:
        """Returns the location of a tensor, after checking that it lies within its storage."""
        storage, dtype = record.storage, _NUMPY[record.dtype]
        where = f'tensor "{printable(name)}"'
        if member is None:
            self._refuse(f"{where} is in a storage that is missing from the file")
        itemsize = _NUMPY[storage.dtype].itemsize if storage.dtype else 1
        if storage.count * itemsize > member.size:
            self._refuse(
                f"{where}: its storage of {storage.count * itemsize} bytes has only {member.size}"
            )
        last = record.offset
        if 0 not in record.shape:
            for length, stride in zip(record.shape, record.strides, strict=True):
                last += (length - 1) * stride
            last += 1
        if last * dtype.itemsize > storage.count * itemsize:
            self._refuse(f"{where} reaches beyond the end of its storage")
        if math.prod(length or 1 for length in record.shape) * dtype.itemsize >= 2**63:
            self._refuse(f"{where} has more values than memory can hold")
        strides = tuple(stride * dtype.itemsize for stride in record.strides)
        if 0 in record.shape or max(strides, default=0) >= 2**63:
            strides = (0,) * len(strides)  # harmless: such dimensions have length 1 or 0
        start = member.start + record.offset * dtype.itemsize
        return _Entry(dtype, record.shape, start, strides)

    def names(self) -> list[str]:
        """Returns the names of the tensors in the file."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype."""
        return self._entries[name].dtype

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or a slice of its rows.

        The array is read-only: a view of the file, or a copy if it is not contiguous or aligned.
        `rows` is ignored for a scalar.
        """
        check_length(self.path, self.mapped)
        dtype, shape, offset, strides = entry = self._entries[name]
        if self.on_read is not None:
            first, last = 0, entry.extent
            if entry.contiguous:
                first, last = byte_range(shape, entry.nbytes, rows)
            self.on_read(offset + first, offset + last)
        if 0 in shape:
            value = np.empty(shape, dtype)
        else:
            value = np.ndarray(shape, dtype, self.mapped, offset, strides)
        value = np.require(value[rows] if shape else value, requirements=["C", "A"])
        value.flags.writeable = False
        return value


def _check_format(head: bytes, path: Path) -> None:
    """Checks that a file is a zip file; the error names the format that it has instead.

    Args:
      head: first 512 bytes of the file.
      path: path of the file.
    """
    if head.startswith(b"PK\x03\x04"):
        return
    if head[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        problem = f"is in the tar format of PyTorch before 0.1.10: {_WRITE_AGAIN}"
    elif head.startswith(b"\x80"):
        problem = f"is a plain pickle, as PyTorch wrote before 1.6: {_WRITE_AGAIN}"
    elif not head:
        problem = "is empty"
    else:
        problem = f"is not a zip file of torch.save: {ANOTHER_WAY}"
    raise JaxtuneError(f"{path}: {problem}")
