"""Intervals as configs write them: ``50``, ``0.5 epochs``, ``10 minutes``."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.errors import JaxtuneError, closest, shown

UNITS = ("steps", "epochs", "tokens", "minutes")
_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_MAXIMUM = 1e15  # integers up to here are exact in a float
_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kKmMbB])\s+)?([a-zA-Z]+)")


class Interval(NamedTuple):
    """A number of steps, epochs, tokens or minutes; 0 means never."""

    amount: float
    unit: str = "steps"


def parse_interval(key: str, value: int | str) -> Interval:
    """Parses an interval.

    Args:
      key: config key, for the message.
      value: a number of steps, or a number and a unit of `UNITS`, singular or plural; tokens may
        have a multiplier k, M or B (10³, 10⁶, 10⁹).

    Raises:
      JaxtuneError: the value has another form, is negative or above 10¹⁵.
    """
    if isinstance(value, int) and abs(value) > _MAXIMUM:
        raise JaxtuneError(f"{key} is at most 10¹⁵, not {shown(value)}")
    text = str(value).strip()
    if text.isdecimal():
        return _checked(key, text, float(text))
    match = _FORM.fullmatch(text)
    if match is None:
        raise JaxtuneError(
            f"{key} must be a number of steps, or a number and a unit (steps, epochs, tokens or "
            f'minutes) such as "0.5 epochs", not {shown(value)}'
        )
    number, multiple, word = match.groups()
    unit = word.lower() if word.lower().endswith("s") else f"{word.lower()}s"
    if unit not in UNITS or (multiple and unit != "tokens"):
        raise JaxtuneError(
            f'{key}={shown(value)}: unknown unit "{text[match.end(1) :].strip()[:40]}"'
            f"{closest(unit, UNITS)} (known: {', '.join(UNITS)}; tokens also in k, M or B)"
        )
    amount = float(number) * _MULTIPLES[(multiple or "").lower()]
    if unit == "steps" and amount != int(amount):
        raise JaxtuneError(f"{key}={shown(value)}: the number of steps must be an integer")
    return _checked(key, text, amount, unit)


def _checked(key: str, text: str, amount: float, unit: str = "steps") -> Interval:
    if amount > _MAXIMUM:
        raise JaxtuneError(f"{key} is at most 10¹⁵, not {shown(text)}")
    return Interval(amount, unit)
