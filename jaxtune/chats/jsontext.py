"""JSON within strings, such as messages in a CSV cell or the arguments of a tool call."""

from __future__ import annotations

from typing import Any

from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import parse_json

# Floats of this size are multiples of 0.5, so each one is printed exactly.
_FIRST_PLACEHOLDER = 2.0**51 + 0.5


def parse_json_text(value: Any, place: str) -> Any:
    """Parses the JSON text of a list or an object; returns any other value unchanged.

    Args:
      value: a string that begins with ``[`` or ``{``, or any other value.
      place: location of the value, for errors.

    Raises:
      JaxtuneError: invalid JSON, or an object with a duplicate key.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        text = value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise JaxtuneError(f"{place}: not UTF-8") from error
    return parse_json(text, place)


def parse_exact_numbers(text: str, taken: str, numbers: dict[str, str]) -> Any:
    """Parses JSON so that `restore_numbers` can restore the spelling of each number.

    A template prints parsed numbers, and Python's float prints 1.10 as 1.1, 0.00001 as 1e-05 and
    keeps at most 17 digits. A number that would be printed differently is therefore replaced by a
    placeholder: a float whose text is unique. After rendering, that text is replaced by the
    original spelling.

    Args:
      text: JSON text.
      taken: text that must not contain a placeholder.
      numbers: original spelling of each replaced number by the text of its placeholder, updated in
        place.
    """

    def read(written: str) -> float:
        value = float(written)
        return value if repr(value) == written else placeholder(written)

    def read_integer(written: str) -> float:
        value = int(written)
        return value if str(value) == written else placeholder(written)  # -0

    def placeholder(written: str) -> float:
        value = _FIRST_PLACEHOLDER + len(numbers)
        while repr(value) in taken or repr(value) in numbers:
            value += 1
        numbers[repr(value)] = written
        return value

    return parse_json(text.encode(), "arguments", parse_float=read, parse_int=read_integer)


def restore_numbers(text: str, numbers: dict[str, str]) -> str:
    """Replaces the placeholders of `parse_exact_numbers` in a text by the original spellings."""
    for placeholder, written in numbers.items():
        text = text.replace(placeholder, written)
    return text
