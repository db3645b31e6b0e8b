"""All reading of JSON: strict, from bytes or a file, with checks of the values.

Rejects what Python's reader accepts: NaN and infinity, duplicate keys, deep nesting.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from jaxtune.errors import JaxtuneError, shown

# Far below Python's recursion limit, which rendering and hashing would reach at other depths.
MAX_DEPTH = 100
# The index of a model with 100,000 tensors has 10 MB. Parsed JSON needs up to 25 times its size.
MAX_BYTES = 2**25
# An index has two levels of text, and hundreds of thousands of tensors of quantized experts.
MAX_INDEX_BYTES = 2**26

_T = TypeVar("_T")
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
}


def decode(text: bytes, place: str, unit: str = "line") -> str:
    """Returns text in UTF-8, without its byte-order mark; see `parse_json`."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the {unit}"
        raise JaxtuneError(f"{place}: not UTF-8 ({where}: {error.reason})") from error


def parse_json(
    text: bytes,
    place: str,
    unit: str = "line",
    *,
    parse_float: Callable[[str], Any] | None = None,
    parse_int: Callable[[str], Any] | None = None,
) -> Any:
    """Parses JSON in UTF-8.

    Args:
      text: the complete document.
      place: location of the document, for errors.
      unit: kind of document, for errors: a line or a file.
      parse_float: conversion of numbers with a fraction or an exponent; float by default.
      parse_int: conversion of other numbers; int by default.

    Raises:
      JaxtuneError: the text is not JSON, has a duplicate key or is nested too deeply.
    """
    try:
        value = json.loads(
            decode(text, place, unit),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=parse_float,
            parse_int=parse_int,
        )
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
            _check_depth(value)
        return value
    except JaxtuneError:
        raise
    except json.JSONDecodeError as error:
        # A document of one line has its line number in `place`, if it has one.
        line = f":{error.lineno}" if unit == "file" else ""
        where = f"column {error.colno}" if line or error.lineno == 1 else f"line {error.lineno}"
        raise JaxtuneError(f"{place}{line}: invalid JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise JaxtuneError(f"{place}: JSON is nested too deeply") from error
    except ValueError as error:
        digits = "int_max_str_digits" in str(error)  # Python's limit on converting integers
        reason = "an integer of more than 4300 digits" if digits else error
        raise JaxtuneError(f"{place}: invalid JSON: {reason}") from error


def is_object(text: bytes) -> bool:
    """Returns whether a text is a JSON object, even one that `parse_json` rejects."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def open_regular(path: str | Path) -> IO[bytes]:
    """Opens a regular file for reading; a fifo, which could keep it waiting, is an error.

    Raises:
      JaxtuneError: the file is missing, cannot be opened or is not a regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise JaxtuneError(f"{path}: no such file") from None
    except OSError as error:
        raise JaxtuneError(f"{path}: cannot read: {error.strerror}") from None
    except ValueError as error:  # a NUL, or a surrogate that no encoding has
        raise JaxtuneError(f"{str(path)!r}: not the name of a file ({error})") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise JaxtuneError(f"{path}: not a regular file")
    return os.fdopen(handle, "rb")


def read_bytes(path: str | Path, limit: int | None = None) -> bytes:
    """Returns the content of a regular file of up to `limit` bytes, `MAX_BYTES` by default.

    Raises:
      JaxtuneError: the file cannot be read, or is larger.
    """
    limit = MAX_BYTES if limit is None else limit
    with open_regular(path) as file:
        try:
            # No more than the size, because the buffer is allocated first.
            content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
        except OSError as error:
            raise JaxtuneError(f"{path}: cannot read: {error.strerror}") from None
    if len(content) > limit:
        raise JaxtuneError(f"{path}: larger than {limit >> 20} MiB")
    return content


def read_text(path: str | Path) -> str:
    """Returns the text of a file in UTF-8, without a byte-order mark; see `read_bytes`."""
    return decode(read_bytes(path), str(path), "file")


def read_json(path: str | Path, limit: int | None = None) -> Any:
    """Returns the value in a JSON file, whose strings can be written; see `read_bytes`.

    Raises:
      JaxtuneError: the file cannot be read, is not JSON, or has an unpaired surrogate.
    """
    text = read_bytes(path, limit)
    return _check_strings(parse_json(text, str(path), "file"), text, str(path))


def read_object(path: str | Path, limit: int | None = None) -> dict[str, Any]:
    """Returns the object in a JSON file; see `read_bytes`.

    Raises:
      JaxtuneError: the file cannot be read, is not JSON, or is not an object.
    """
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise JaxtuneError(f"{path}: not a JSON object")
    return content


def read_objects(
    path: str | Path, *, appended: bool = False
) -> Iterator[tuple[bytes, str, dict[str, Any]]]:
    """Yields the objects in a file of JSON lines, which may have any length.

    Args:
      path: the file.
      appended: the lines were appended one by one, so that the last one may be incomplete; it is
        left out then.

    Yields:
      The line without its end, its location ``"path:number"``, and the object.

    Raises:
      JaxtuneError: the file cannot be read, or a line is too long or not a JSON object.
    """
    with open_regular(path) as file:
        number = 0
        while line := file.readline(MAX_BYTES):
            number += 1
            place = f"{path}:{number}"
            if len(line) == MAX_BYTES:
                raise JaxtuneError(f"{place}: longer than {MAX_BYTES >> 20} MiB")
            if appended and not line.endswith(b"\n"):
                return
            value = _check_strings(parse_json(line, place), line, place)
            yield line.removesuffix(b"\n"), place, expect(value, dict, place)


def expect(value: Any, kind: type[_T], place: str) -> _T:
    """Returns a value of JSON after checking its type.

    Args:
      value: the value.
      kind: dict, list, str, int, float (any finite number) or bool.
      place: location of the value, for the error.

    Raises:
      JaxtuneError: the value has another type.
    """
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is kind and finite:
        return value
    raise JaxtuneError(f"{place}: {shown(value, 60)} is not {_KINDS[kind]}")


def entry(content: Mapping[str, Any], key: str, kind: type[_T], place: str | Path) -> _T:
    """Returns the value of a key of an object in a file.

    Args:
      content: the object.
      key: the key.
      kind: type of the value; see `expect`.
      place: file or location of the object, for errors.

    Raises:
      JaxtuneError: the key is missing, or its value has another type.
    """
    if key not in content:
        raise JaxtuneError(f'{place}: has no "{key}"')
    return expect(content[key], kind, f'{place}: "{key}"')


def _check_strings(value: Any, text: bytes, place: str) -> Any:
    """Returns the value of a JSON text; raises if a string in it cannot be written as UTF-8."""
    if b"\\ud" in text or b"\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise JaxtuneError(f"{place}: a string has an unpaired surrogate") from error
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        if not level:
            return
    raise RecursionError


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"duplicate key {json.dumps(twice, ensure_ascii=False)}")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")
