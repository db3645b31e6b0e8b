"""Options: the declaration of a config section's fields, and the checks of their values."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

import ml_collections

from jaxtune.errors import JaxtuneError, lookup
from jaxtune.intervals import parse_interval
from jaxtune.strict_json import parse_json

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
      maximum: largest valid number; None: unbounded.
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
            return self._names(key, value)
        if self.json:
            return _json_text(key, value)
        if self.interval:
            return _interval(key, value)
        if self.share and isinstance(value, float):
            if not 0 <= value < 1:
                raise JaxtuneError(f"{key} takes a whole number, or a share below 1, not {value!r}")
            return value
        wanted = type(self.default)
        if self.share and isinstance(value, int) and not isinstance(value, bool):
            wanted = int
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not wanted:
            raise JaxtuneError(f"{key} takes {wanted.__name__}, not {value!r}")
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
                raise JaxtuneError(f"{key} takes true or false, not {text!r}")
            return words[text.lower()]
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text  # names; for any other option, `check` reports the type

    def _check_range(self, key: str, value: OptionValue) -> None:
        if self.choices and value not in self.choices:
            lookup({choice: None for choice in self.choices if choice}, str(value), key)
        if not isinstance(value, (int, float)):
            return
        if not math.isfinite(value):
            raise JaxtuneError(f"{key} takes a finite number, not {value!r}")
        if self.minimum is not None and value < self.minimum:
            raise JaxtuneError(f"{key} is at least {self.minimum:g}, not {value!r}")
        if self.maximum is not None and value > self.maximum:
            raise JaxtuneError(f"{key} is at most {self.maximum:g}, not {value!r}")

    def _names(self, key: str, value: object) -> tuple[str, ...]:
        if value == "" and not self.default:
            return ()
        given: tuple[object, ...] = (value,)
        if isinstance(value, str) and "(" not in value:
            given = tuple(value.split(","))
        elif isinstance(value, Iterable) and not isinstance(value, str):
            given = tuple(value)
        # Integers count as names, for the steps of a profile, written (10, 20) in a config file.
        names = [str(name).strip() for name in given if type(name) is int or isinstance(name, str)]
        if (self.default and not names) or not all(names) or len(names) < len(given):
            raise JaxtuneError(f"{key} takes one or more names, not {value!r}")
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


def _interval(key: str, value: object) -> int | str:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise JaxtuneError(f"{key} takes a number of steps or an interval, not {value!r}")
    parse_interval(key, value)
    return int(value) if str(value).strip().isdecimal() else value


def _json_text(key: str, value: object) -> str:
    """Returns a mapping, or the JSON text of one, as JSON text; an empty string if it is empty."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    try:
        given = parse_json((value or "{}").encode(), key) if isinstance(value, str) else value
        text = json.dumps(given, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise JaxtuneError(f"{key} takes a JSON object, not {value!r}: {error}") from error
    if not isinstance(given, Mapping):
        raise JaxtuneError(f"{key} takes a JSON object, not {value!r}")
    return text if given else ""
