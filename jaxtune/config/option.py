"""Options: the declaration of a config section's fields, and the checks of their values."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import ml_collections

from jaxtune.errors import JaxtuneError, lookup, shown
from jaxtune.intervals import parse_interval
from jaxtune.strict_json import parse_json

# Text of an option that may be a number is evaluated as a Python literal up to these lengths, which
# bound its nesting and its digits.
_NUMBER, _SEQUENCE = 100, 1000
_LONGEST_NAME = 1000
_LARGEST = {int: 2**31 - 1, float: 3.4e38}  # of the dtypes int32 and float32 on devices
_SUFFIXED = re.compile(r"(\d+(?:\.\d+)?)([kKmMbB])")
_MULTIPLES = {"k": 10**3, "m": 10**6, "b": 10**9}

OptionValue: TypeAlias = bool | int | float | str | tuple[str, ...]
"""The value of an option."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a section.

    Attributes:
      default: default value; its type is the type of the option.
      help: description, one phrase.
      choices: valid values; empty: any.
      minimum: smallest valid number; None: unbounded.
      maximum: largest valid number; None: that of int32 or float32.
      nonzero: whether 0 is invalid.
      least: smallest valid number above 0, where 0 switches something off; None: any.
      names: whether the value is one or more names: a comma-separated string or a sequence.
      share: whether a float is a fraction below 1; an integer is a count.
      interval: whether the value is an interval in the syntax of `parse_interval`.
      json: whether the value is a mapping or the text of a JSON object; it is stored as text.
    """

    default: OptionValue
    help: str
    choices: Collection[str] = ()
    minimum: float | None = None
    maximum: float | None = None
    nonzero: bool = False
    least: float | None = None
    names: bool = False
    share: bool = False
    interval: bool = False
    json: bool = False

    def check(self, key: str, value: object) -> OptionValue:
        """Checks a value and converts it to the type of the option.

        Args:
          key: ``section.name``, for errors.
          value: value from a config file or from `parse`.

        Raises:
          JaxtuneError: the value is not valid for the option.
        """
        if self.names:
            names = self._names(key, value)
            for name in names:
                if len(_check_text(key, name)) > _LONGEST_NAME:
                    raise JaxtuneError(
                        f"{key}: a name of more than {_LONGEST_NAME} characters: {shown(name)}"
                    )
            return names
        if self.json:
            return _check_text(key, _json_text(key, value))
        if self.interval:
            return _interval(key, value)
        if self.share and isinstance(value, float):
            if not 0 <= value < 1:
                raise JaxtuneError(
                    f"{key} takes a whole number, or a share below 1, not {shown(value)}"
                )
            return value
        wanted = type(self.default)
        if self.share and isinstance(value, int) and not isinstance(value, bool):
            wanted = int
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if value.bit_length() < 1000 else math.inf
        if type(value) is not wanted:
            hint = _hint(value) if wanted in (int, float) else ""
            raise JaxtuneError(f"{key} takes {wanted.__name__}, not {shown(value)}{hint}")
        if isinstance(value, str):
            _check_text(key, value)
        self._check_range(key, value)
        return value

    def parse(self, key: str, text: str) -> object:
        """Parses a value from the command line, to be checked with `check`.

        Raises:
          JaxtuneError: a value of a bool option is not true or false.
        """
        if isinstance(self.default, str):
            return text
        if isinstance(self.default, bool):
            words = {"true": True, "1": True, "false": False, "0": False}
            if text.lower() not in words:
                raise JaxtuneError(f"{key} takes true or false, not {shown(text)}")
            return words[text.lower()]
        if self.names:  # text, also if it reads as a number; a literal only for several names
            value = _literal(text, _SEQUENCE) if text.startswith(("[", "(")) else text
            return value if isinstance(value, (list, tuple)) else text
        return _literal(text, _NUMBER)

    def _check_range(self, key: str, value: OptionValue) -> None:
        if self.choices and value not in self.choices:
            lookup({choice: None for choice in self.choices if choice}, str(value), key)
        if not isinstance(value, (int, float)):
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise JaxtuneError(f"{key} takes a finite number, not {value!r}")
        low, high = self.limits()
        if low is not None and value < low:
            raise JaxtuneError(f"{key} is at least {number(low)}, not {shown(value)}")
        if high is not None and value > high:
            raise JaxtuneError(f"{key} is at most {number(high)}, not {shown(value)}")
        if self.least is not None and 0 < value < self.least:
            raise JaxtuneError(f"{key} is 0 or at least {number(self.least)}, not {shown(value)}")
        if self.nonzero and not value:
            raise JaxtuneError(f"{key} is {number(low or 0)} or at least 1, not 0")

    def limits(self) -> tuple[float | None, float | None]:
        """Returns the smallest and the largest valid number; None where there is no limit."""
        if isinstance(self.default, (bool, str, tuple)):
            return None, None
        largest = _LARGEST[type(self.default)]
        # A number without a minimum may be as far below 0.
        low = -largest if self.minimum is None else self.minimum
        return low, largest if self.maximum is None else self.maximum

    def _names(self, key: str, value: object) -> tuple[str, ...]:
        if value == "" and not self.default:
            return ()
        given: tuple[object, ...] = (value,)
        if isinstance(value, str) and "(" not in value:
            given = tuple(value.split(","))
        elif isinstance(value, (list, tuple, set, frozenset)):  # not an iterator, which may not end
            given = tuple(value)
        # Integers count as names, for the steps of a profile, written (10, 20) in a config file.
        names = [str(name).strip() for name in given if type(name) is int or isinstance(name, str)]
        if (self.default and not names) or not all(names) or len(names) < len(given):
            raise JaxtuneError(f"{key} takes one or more names, not {shown(value)}")
        return tuple(names)


def option(default: OptionValue, help: str, **check: Any) -> Any:
    """Declares a field of a section; `check` are further attributes of `Option`."""
    about = Option(default, help, **check)
    return dataclasses.field(default=default, metadata={"option": about})


class Section:
    """Base class of the sections, which are frozen dataclasses of options."""

    def to_dict(self) -> Mapping[str, OptionValue]:
        """Returns the options by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def options_of(section: Section) -> dict[str, Option]:
    """Returns the options of a section by name, in the order of its fields."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(section)}  # type: ignore[arg-type]


def number(value: float) -> str:
    """Returns a limit as text, integers in full."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _literal(text: str, length: int) -> object:
    """Returns a Python literal, or the text if it is none or longer than `length`."""
    try:
        return ast.literal_eval(text) if len(text) <= length else text
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def _hint(value: object) -> str:
    """Returns how to write a value such as ``5k`` or ``1e6`` as a whole number, if it is one."""
    if isinstance(value, str) and (match := _SUFFIXED.fullmatch(value)):
        value = float(match[1]) * _MULTIPLES[match[2].lower()]
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return f"; write {int(value)}" if whole else ""  # type: ignore[arg-type]


def _check_text(key: str, text: str) -> str:
    """Returns a text; raises if it cannot be part of a path or be written to a file in UTF-8."""
    if "\0" in text:
        raise JaxtuneError(f"{key} contains a NUL character: {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JaxtuneError(f"{key} is not UTF-8: {shown(text)}") from None
    return text


def _interval(key: str, value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise JaxtuneError(f"{key} takes a number of steps or an interval, not {shown(value)}")
    parse_interval(key, value)
    return int(value) if str(value).strip().isdecimal() else value


def _json_text(key: str, value: object) -> str:
    """Returns a mapping, or the JSON text of one, as JSON text; an empty string if it is empty."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    try:
        given = parse_json((value or "{}").encode(), key) if isinstance(value, str) else value
        text = json.dumps(given, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise JaxtuneError(f"{key} takes a JSON object, not {shown(value)}: {error}") from error
    if not isinstance(given, Mapping):
        raise JaxtuneError(f"{key} takes a JSON object, not {shown(value)}")
    return text if given else ""
