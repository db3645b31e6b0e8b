"""The one error type that users see, and the helpers that make its messages useful."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from jaxtune.memory_errors import is_out_of_memory

_Value = TypeVar("_Value")


class JaxtuneError(ValueError):
    """A mistake that the user can mend: the message is one line naming the thing and the place.

    The command line prints the message alone and exits with `exit_code`.
    """

    exit_code = 65  # do not try again: the same would happen


class Retry(JaxtuneError):
    """What the same command, run again, goes on from: a machine that was lost, or got stuck."""

    exit_code = 75


def closest(name: str, choices: Iterable[str]) -> str:
    """Returns ``'; did you mean "x"?'`` for the choice nearest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, [str(c) for c in choices], n=1, cutoff=0.5)
    return f'; did you mean "{match[0]}"?' if match else ""


def lookup(registry: Mapping[str, _Value], name: str, key: str) -> _Value:
    """Returns `registry[name]`.

    Args:
      registry: what exists, by name.
      name: what was asked for.
      key: the config key or place that asked, for the message.

    Raises:
      JaxtuneError: `name` is not registered; the message lists what is.
    """
    if name not in registry:
        known = ", ".join(sorted(registry)) or "none yet"
        raise JaxtuneError(f'{key}="{name}" is unknown{closest(name, registry)} (known: {known})')
    return registry[name]


def explain(error: Exception) -> str | None:
    """Returns a line for the user, or None where only a developer can help."""
    if isinstance(error, JaxtuneError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return (
            "out of memory: a larger training.accumulation, a smaller data.max_length or "
            f"training.remat=full needs less; {str(error)[:200]}"
        )
    return None
