"""Strict JSON: rejects NaN, duplicate keys and deep nesting, which Python's reader accepts."""

from __future__ import annotations

import json
from typing import Any

from jaxtune.errors import JaxtuneError

# Far below Python's recursion limit, which rendering and hashing would reach at other depths.
MAX_DEPTH = 100


def decode(text: bytes, place: str, unit: str = "line") -> str:
    """Returns text in UTF-8, without its byte-order mark; see `parse_json`."""
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} of the {unit}"
        raise JaxtuneError(f"{place}: not UTF-8 ({where}: {error.reason})") from error


def parse_json(text: bytes, place: str, unit: str = "line") -> Any:
    """Parses JSON in UTF-8.

    Args:
      text: the complete document.
      place: location of the document, for errors.
      unit: kind of document, for errors: a line or a file.

    Raises:
      JaxtuneError: the text is not JSON, has a duplicate key or is nested too deeply.
    """
    try:
        value = json.loads(
            decode(text, place, unit), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
        if text.count(b"[") + text.count(b"{") > MAX_DEPTH:
            _check_depth(value)
        return value
    except JaxtuneError:
        raise
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
        raise JaxtuneError(f"{place}: invalid JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise JaxtuneError(f"{place}: JSON is nested too deeply") from error
    except ValueError as error:
        digits = "int_max_str_digits" in str(error)  # Python's limit on converting integers
        reason = "an integer of more than 4300 digits" if digits else error
        raise JaxtuneError(f"{place}: invalid JSON: {reason}") from error


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
        keys = [key for key, _ in pairs]
        twice = json.dumps(next(k for k in keys if keys.count(k) > 1), ensure_ascii=False)
        raise ValueError(f"duplicate key {twice}")
    return values


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")
