"""The directory of a zip archive, read from a memory map.

The standard library's `zipfile` takes 800 MB for a directory of 10⁶ entries, and does not compare
the entries with one another. Here the directory is bounded before it is read.

Source: the format's own description, APPNOTE.TXT of PKWARE.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxtune.errors import JaxtuneError

MEMBERS = 2**17 + 2**10  # a file for each tensor, and the others
DIRECTORY_BYTES = 64 * 2**20

_END = struct.Struct("<4s4H2LH")
_LOCATOR64 = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x2041  # flags: of the file, strongly, of the directory


class Member(NamedTuple):
    """A file in the archive.

    Attributes:
      start: of its bytes in the archive.
      size: in bytes, as they are stored.
      crc: its checksum; 0 where none was written.
      plain: whether it is neither compressed nor encrypted.
    """

    start: int
    size: int
    crc: int
    plain: bool


class _Listed(NamedTuple):
    """What the directory says of a file: it begins with a header of its own at `header`."""

    name: bytes
    header: int
    size: int
    crc: int
    plain: bool


def read_directory(data: mmap.mmap, path: Path) -> dict[str, Member]:
    """Returns the files of an archive by name.

    Each lies in the archive, and no two overlap.

    Args:
      data: the mapped archive.
      path: of the archive, for messages.

    Raises:
      JaxtuneError: not such an archive, or not a whole one.
    """
    try:
        at, end, count = _find(data, path)
        listed = sorted(_entries(data, at, end, count, path), key=lambda each: each.header)
        return _members(data, listed, at, path)
    except (struct.error, UnicodeDecodeError):
        raise _malformed(path) from None


def _malformed(path: Path) -> JaxtuneError:
    return JaxtuneError(f"{path}: is not a whole zip file: its directory is malformed")


def _find(data: mmap.mmap, path: Path) -> tuple[int, int, int]:
    """Returns where the directory begins and ends, and how many entries it has."""
    end = len(data) - _END.size
    if end < 0 or data[end : end + 4] != b"PK\5\6":
        raise JaxtuneError(f"{path}: is not a whole zip file: it does not end with a directory")
    _, *_, count, size, at, _ = _END.unpack_from(data, end)
    locator = end - _LOCATOR64.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\6\7":
        end = _LOCATOR64.unpack_from(data, locator)[2]
        signature, *_, count, size, at = _END64.unpack_from(data, min(end, len(data)))
        if signature != b"PK\6\6" or end + _END64.size != locator:
            raise _malformed(path)
    if count > MEMBERS or size > DIRECTORY_BYTES:
        raise JaxtuneError(f"{path}: lists {count} files in {size} bytes, more than is read")
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
    """Yields 32-bit values, or those of 64 bits that stand for them in an extra field."""
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
    """Compares the entries, in the order of their place, with the headers and one another."""
    members: dict[str, Member] = {}
    free = 0  # where the next one may begin
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
            raise JaxtuneError(f"{path}: is not a whole zip file: its files overlap")
        members[text] = Member(start, size, crc, plain)
        free = start + size
    return members
