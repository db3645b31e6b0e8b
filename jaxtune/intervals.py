"""How often something happens, as a config says it: ``50``, ``0.5 epochs``, ``10 minutes``."""

from __future__ import annotations

import re
from typing import NamedTuple

from jaxtune.errors import JaxtuneError, closest

UNITS = ("steps", "epochs", "tokens", "minutes")
_MULTIPLES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:([kKmMbB])\s+)?([a-zA-Z]+)")


class Interval(NamedTuple):
    """A number of steps, epochs, tokens or minutes; 0 is never."""

    amount: float
    unit: str = "steps"


def parse_interval(key: str, value: int | str) -> Interval:
    """Reads an interval.

    Args:
      key: the config key, for the message.
      value: a number of updates, or a number and a unit of `UNITS`, in the singular too; tokens
        may be counted in k, M or B (10³, 10⁶, 10⁹).

    Raises:
      JaxtuneError: it is of another form, or negative.
    """
    text = str(value).strip()
    if text.isdecimal():
        return Interval(float(text))
    match = _FORM.fullmatch(text)
    if match is None:
        raise JaxtuneError(
            f"{key} takes a number of updates, or a number with steps, epochs, tokens or minutes "
            f'such as "0.5 epochs", not {value!r}'
        )
    number, multiple, word = match.groups()
    unit = word.lower() if word.lower().endswith("s") else f"{word.lower()}s"
    if unit not in UNITS or (multiple and unit != "tokens"):
        raise JaxtuneError(
            f'{key}={value!r}: "{text[match.end(1) :].strip()}" is no unit'
            f"{closest(unit, UNITS)} (known: {', '.join(UNITS)}; tokens also in k, M or B)"
        )
    amount = float(number) * _MULTIPLES[(multiple or "").lower()]
    if unit == "steps" and amount != int(amount):
        raise JaxtuneError(f"{key}={value!r}: there are no parts of steps")
    return Interval(amount, unit)
