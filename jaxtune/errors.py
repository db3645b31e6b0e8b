"""The error type for mistakes of the user, and helpers for its messages."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxtune.memory_errors import is_out_of_memory

_Value = TypeVar("_Value")


BAD_PATTERN = (re.error, OverflowError, RecursionError)
"""What `re.compile` raises for an invalid, an oversized and a deeply nested expression."""


class JaxtuneError(ValueError):
    """An error that the user can fix; its message is one line with the subject and its location.

    The command line prints only the message and exits with `exit_code`.
    """

    exit_code = 65  # running the command again would fail in the same way


class Retry(JaxtuneError):
    """A lost or stuck machine; running the same command again resumes the run."""

    exit_code = 75


def closest(name: str, choices: Iterable[str]) -> str:
    """Returns ``'; did you mean "x"?'`` for the closest choice, or an empty string."""
    match = difflib.get_close_matches(name, [str(c) for c in choices], n=1, cutoff=0.5)
    return f'; did you mean "{match[0]}"?' if match else ""


def shown(value: object, limit: int = 80) -> str:
    """Returns `repr(value)` for a message, shortened to `limit` characters."""
    if isinstance(value, int) and value.bit_length() > 4 * limit:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print large ones
    try:
        text = repr(value)
    except Exception:  # of a class in a config file
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def lookup(registry: Mapping[str, _Value], name: str, key: str) -> _Value:
    """Returns `registry[name]`.

    Args:
      registry: registered values by name.
      name: name to look up.
      key: config key or argument that holds `name`, for the message.

    Raises:
      JaxtuneError: `name` is not registered; the message lists the registered names.
    """
    if not isinstance(name, str) or name not in registry:
        known = ", ".join(sorted(registry)) or "none"
        written = f'"{name}"' if isinstance(name, str) and len(name) <= 100 else shown(name)
        hint = closest(str(name)[:100], registry)
        raise JaxtuneError(f"{key}={written} is unknown{hint} (known: {known})")
    return registry[name]


def check_argument(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    """Raises if an argument of the Python interface has another type.

    Args:
      name: name of the argument.
      value: its value.
      kinds: valid types; bool does not count as int.
      expected: description of a valid value, such as "a list of prompts".

    Raises:
      JaxtuneError: the value has another type.
    """
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise JaxtuneError(f"{name} is {expected}, not {shown(value)}")


def check_path(name: str, value: Any) -> Path:
    """Returns a path that was given as an argument.

    Raises:
      JaxtuneError: the value is not a path, is empty, has a NUL or is not UTF-8.
    """
    check_argument(name, value, (str, os.PathLike), "a path")
    text = os.fspath(value)
    if not isinstance(text, str) or not text:
        raise JaxtuneError(f"{name} is a path, not {shown(text)}")
    try:
        parts = text.encode().split(b"/")
    except UnicodeEncodeError:
        raise JaxtuneError(f"{name} is not UTF-8: {shown(text)}") from None
    if len(text.encode()) > 4095 or max(map(len, parts)) > 255:  # limits of Linux
        raise JaxtuneError(f"{name} is too long: {shown(text)}")
    if "\0" in text:
        raise JaxtuneError(f"{name} contains a NUL character: {shown(text)}")
    return Path(text)


def user_message(error: Exception) -> str | None:
    """Returns the message of an error that a user can fix; None for a bug."""
    if isinstance(error, JaxtuneError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return (
            "out of memory: try a larger training.accumulation, a smaller data.max_length or "
            f"training.remat=full; {str(error)[:200]}"
        )
    return None
