"""The directory of a zip archive, read from a memory map.

The standard library's `zipfile` needs 800 MB for a directory of 10⁶ entries and does not check
whether entries overlap. Here the size of the directory is limited before it is read.

Source: the specification, APPNOTE.TXT of PKWARE.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtune.errors import JaxtuneError

MEMBERS = 2**17 + 2**10  # maximum number of files: one per tensor, and some others
DIRECTORY_BYTES = 64 * 2**20

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041  # flag bits: encrypted, strongly encrypted, encrypted directory


class Member(NamedTuple):
    """A file in the archive.

    Attributes:
      start: offset of its content in the archive, in bytes.
      size: size in the archive, in bytes.
      crc: CRC-32 checksum; 0 if none was written.
      plain: whether it is neither compressed nor encrypted.
    """

    start: int
    size: int
    crc: int
    plain: bool


class _Listed(NamedTuple):
    """A file's entry in the directory; `header` is the offset of its local header."""

    name: bytes
    header: int
    size: int
    crc: int
    plain: bool


def read_directory(data: mmap.mmap, path: Path) -> dict[str, Member]:
    """Returns the files of an archive by name, checked to be inside it and not to overlap.

    Args:
      data: the mapped archive.
      path: path of the archive, for messages.

    Raises:
      JaxtuneError: not a zip archive, or a truncated or malformed one.
    """
    try:
        at, end, count = _find(data, path)
        listed = sorted(_entries(data, at, end, count, path), key=lambda entry: entry.header)
        return _members(data, listed, at, path)
    except (struct.error, UnicodeDecodeError):
        raise _malformed(path) from None


def _malformed(path: Path) -> JaxtuneError:
    return JaxtuneError(f"{path}: is not a valid zip file: its directory is malformed")


def _find(data: mmap.mmap, path: Path) -> tuple[int, int, int]:
    """Returns the offsets of the directory's start and end, and its number of entries.

    The archive ends with a record that locates the directory. In the zip64 variant that record is
    preceded by a locator of a second record with 64-bit numbers. Neither may be followed by a
    comment, which torch.save does not write.
    """
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != b"PK\5\6":
        raise JaxtuneError(f"{path}: is not a valid zip file: it does not end with a directory")
    _, *_, count, size, at, _ = _END.unpack_from(data, end)
    locator = end - _LOCATOR64.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        end = _LOCATOR64.unpack_from(data, locator)[2]
        signature, *_, count, size, at = _END64.unpack_from(data, min(end, len(data)))
        if signature != b"PK\6\6" or end + _END64.size != locator:
            raise _malformed(path)
    if count > MEMBERS or size > DIRECTORY_BYTES:
        raise JaxtuneError(f"{path}: lists {count} files in {size} bytes, more than the limit")
    if at + size != end:
        raise _malformed(path)
    return at, end, count


def _entries(data: mmap.mmap, at: int, end: int, count: int, path: Path) -> Iterator[_Listed]:
    for _ in range(count):
        entry = _ENTRY.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc, packed, size = entry[:10]
        name_size, extra_size, comment_size, _, _, _, header = entry[10:]
        at += _ENTRY.size
        name, at = data[at : at + name_size], at + name_size
        extra, at = data[at : at + extra_size], at + extra_size + comment_size
        if signature != b"PK\1\2":
            raise _malformed(path)
        size, packed, header = _wide(extra, size, packed, header)
        plain = not method and packed == size and not flags & _ENCRYPTED
        yield _Listed(name, header, packed, crc, plain)
    if at != end:
        raise _malformed(path)


def _wide(extra: bytes, *values: int) -> Iterator[int]:
    """Yields the values, with those of 0xFFFFFFFF replaced from the zip64 extra field."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    at = 0
    for value in values:
        if value == 0xFFFFFFFF:
            (value,) = struct.unpack_from("<Q", wide, at)
            at += 8
        yield value


def _members(data: mmap.mmap, listed: list[_Listed], end: int, path: Path) -> dict[str, Member]:
    """Checks the entries, sorted by offset, against local headers and for overlaps."""
    members: dict[str, Member] = {}
    free = 0  # lowest offset at which the next file may begin
    for name, header, size, crc, plain in listed:
        if header + _LOCAL.size > end:
            raise _malformed(path)
        signature, *_, name_size, extra_size = _LOCAL.unpack_from(data, header)
        after = header + _LOCAL.size
        if signature != b"PK\3\4" or data[after : after + name_size] != name:
            raise _malformed(path)
        start = after + name_size + extra_size
        text = name.decode("utf-8")
        if header < free or start + size > end or text in members:
            raise JaxtuneError(f"{path}: is not a valid zip file: its files overlap")
        members[text] = Member(start, size, crc, plain)
        free = start + size
    return members
