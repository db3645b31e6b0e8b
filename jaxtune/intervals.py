"""Intervals as configs write them: ``50``, ``0.5 epochs``, ``10 minutes``."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.errors import JaxtuneError, closest

UNITS = ("steps", "epochs", "tokens", "minutes")
_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
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
      JaxtuneError: the value has another form or is negative.
    """
    text = str(value).strip()
    if text.isdecimal():
        return Interval(float(text))
    match = _FORM.fullmatch(text)
    if match is None:
        raise JaxtuneError(
            f"{key} must be a number of steps, or a number and a unit (steps, epochs, tokens or "
            f'minutes) such as "0.5 epochs", not {value!r}'
        )
    number, multiple, word = match.groups()
    unit = word.lower() if word.lower().endswith("s") else f"{word.lower()}s"
    if unit not in UNITS or (multiple and unit != "tokens"):
        raise JaxtuneError(
            f'{key}={value!r}: unknown unit "{text[match.end(1) :].strip()}"'
            f"{closest(unit, UNITS)} (known: {', '.join(UNITS)}; tokens also in k, M or B)"
        )
    amount = float(number) * _MULTIPLES[(multiple or "").lower()]
    if unit == "steps" and amount != int(amount):
        raise JaxtuneError(f"{key}={value!r}: the number of steps must be an integer")
    return Interval(amount, unit)
