"""XLA's out-of-memory errors: how to recognise one, and the sizes that its text names."""

from __future__ import annotations

import re
from typing import NamedTuple

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"\s*([\d.]+)\s*([KMGT]?)i?(?:B|bytes)?\b"
# A program that is too large as a whole: "Used 20.50G of 15.75G hbm" (TPU), "temporaries (" (GPU).
_PROGRAM = re.compile(rf"(?:Used|temporaries \(){_SIZE}")
_LIMIT = re.compile(rf"Used [\d.]+[KMGT] of{_SIZE}")
# One more array: "trying to allocate 2147483648 bytes" (CPU, GPU), "request for 3.50GiB" (TPU).
_ARRAY = re.compile(rf"(?:allocat\w+|request for){_SIZE}")


class Shortage(NamedTuple):
    """The sizes in an out-of-memory error, in bytes; None where its text lacks one.

    Attributes:
      program: needed by the whole program, when it was compiled.
      array: needed by the array that could not be allocated, when it ran.
      limit: available to a program.
    """

    program: int | None
    array: int | None
    limit: int | None


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error of XLA's compiler or runtime is a lack of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def read_shortage(text: str) -> Shortage:
    """Returns the sizes in the text of an out-of-memory error of a CPU, GPU or TPU."""
    return Shortage(*(_bytes(pattern.search(text)) for pattern in (_PROGRAM, _ARRAY, _LIMIT)))


def _bytes(match: re.Match[str] | None) -> int | None:
    return None if match is None else int(float(match[1]) * _UNITS[match[2]])
