"""Reading config.json: the value that is there, or an error that names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import JaxtuneError

_MISSING = object()


def read(config: Mapping[str, Any], key: str, kind: type, default: Any = _MISSING) -> Any:
    """Returns `config[key]` in the type `kind`; a null or absent key takes `default`.

    Raises:
      JaxtuneError: the key is needed and absent, or its value has another type.
    """
    value = config.get(key)
    if value is None:
        if default is _MISSING:
            raise JaxtuneError(f'config.json lacks "{key}"')
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise JaxtuneError(f'config.json: "{key}" is {value!r}, not of type {kind.__name__}')
    return value


def size(config: Mapping[str, Any], key: str, default: Any = _MISSING, *, most: int = 2**24) -> int:
    """Returns a number of units, layers or tokens; see `read`.

    Raises:
      JaxtuneError: the number is not within 1 and `most`, which bounds what a hostile config.json
        can make a program allocate before a tensor contradicts it.
    """
    value = read(config, key, int, default)
    if not 1 <= value <= most:
        raise JaxtuneError(f'config.json: "{key}" is {value}, not within 1 and {most}')
    return value


def require(config: Mapping[str, Any], key: str, supported: tuple[Any, ...]) -> None:
    """Checks a setting that would change the mathematics: absent or one of `supported`.

    Raises:
      JaxtuneError: another value; the message names the key and what is supported.
    """
    if key in config and config[key] not in supported:
        known = ", ".join(repr(value) for value in supported)
        raise JaxtuneError(f'config.json: "{key}"={config[key]!r} is not supported (only {known})')
