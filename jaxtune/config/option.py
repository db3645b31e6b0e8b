"""Options: how a section of the config declares its fields, and which values they take."""

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

OptionValue: TypeAlias = bool | int | float | str | tuple[str, ...]
"""The value of an option."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a section.

    Attributes:
      default: value of a config that does not set it; its type is the option's.
      help: one sentence.
      choices: the values it takes; empty: any.
      minimum: the smallest number.
      maximum: the largest number.
      names: a name, a comma-separated string of names, or a sequence of names.
      share: a whole number, or a fraction below 1.
      interval: an interval as `parse_interval` reads it.
      json: a mapping, or a JSON object as text; kept as text.
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
        """Returns `value` in the type of the option.

        Args:
          key: ``section.name``, for the message.
          value: as a config file or the command line gives it.

        Raises:
          JaxtuneError: a value that the option does not take.
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
        """Reads a value from the command line; `check` decides whether it is one."""
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
            return text  # a list of names; anything else fails its type check

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
        # Numbers are names too: the steps of a profile, written (10, 20) in a config file.
        names = [str(name).strip() for name in given if type(name) is int or isinstance(name, str)]
        if (self.default and not names) or not all(names) or len(names) < len(given):
            raise JaxtuneError(f"{key} takes one or more names, not {value!r}")
        return tuple(names)


def option(default: OptionValue, help: str, **check: Any) -> Any:
    """Declares a field of a section; see `Option` for `check`."""
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
    """Returns a mapping, or JSON text of one, as JSON text; an empty one as an empty string."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    try:
        given = json.loads(value or "{}") if isinstance(value, str) else value
        text = json.dumps(given, ensure_ascii=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise JaxtuneError(f"{key} takes a JSON object, not {value!r}: {error}") from error
    if not isinstance(given, Mapping):
        raise JaxtuneError(f"{key} takes a JSON object, not {value!r}")
    return text if given else ""
