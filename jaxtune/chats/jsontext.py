"""JSON that stands in a string: messages in a CSV cell, arguments of a call, options."""

from __future__ import annotations

import json
from typing import Any

from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import parse_json

# Halves at this size are exact, so that each one is printed with all of its digits.
_FIRST_STAND_IN = 2.0**51 + 0.5


def parse_json_text(value: Any, place: str) -> Any:
    """Returns what JSON text of a list or an object says, and any other value as it is.

    Args:
      value: a string that begins with ``[`` or ``{``, or what is not to be read here.
      place: what to call it in an error.

    Raises:
      JaxtuneError: broken JSON, or an object that names a key twice.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        text = value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise JaxtuneError(f"{place}: not UTF-8") from error
    return parse_json(text, place)


def parse_exact_numbers(text: str, taken: str, numbers: dict[str, str]) -> Any:
    """Parses JSON so that `restore_numbers` gives each number back as it was written.

    A float holds 17 digits at most, and 1.10 and 0.00001 are printed as 1.1 and 1e-05. A number
    that would be printed otherwise is parsed as another float, which stands in for it.

    Args:
      text: JSON.
      taken: text that no stand-in may occur in.
      numbers: takes the written number by the stand-in, as both are printed.
    """

    def read(written: str) -> float:
        value = float(written)
        return value if repr(value) == written else stand_in(written)

    def read_integer(written: str) -> float:
        value = int(written)
        return value if str(value) == written else stand_in(written)  # -0

    def stand_in(written: str) -> float:
        value = _FIRST_STAND_IN + len(numbers)
        while repr(value) in taken or repr(value) in numbers:
            value += 1
        numbers[repr(value)] = written
        return value

    return json.loads(text, parse_float=read, parse_int=read_integer)


def restore_numbers(text: str, numbers: dict[str, str]) -> str:
    """Returns text with the numbers of `parse_exact_numbers` as they were written."""
    for stand_in, written in numbers.items():
        text = text.replace(stand_in, written)
    return text
