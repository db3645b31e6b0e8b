"""The length of a run: ``training.steps``, ``training.epochs`` and ``training.tokens``."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import ml_collections

from jaxtune.config.option import OptionValue
from jaxtune.config.training import TrainingConfig
from jaxtune.errors import JaxtuneError

_log = logging.getLogger(__name__)

LENGTHS = {name: getattr(TrainingConfig(), name) for name in ("steps", "epochs", "tokens")}
"""The options that set the length, with their defaults."""


class TrainingDict(ml_collections.ConfigDict):
    """The ``training`` section of `default`, in which the length that is set last applies."""

    def __setitem__(self, name: str, value: OptionValue) -> None:
        """Sets an option, also for attribute access; a length resets the other two to defaults."""
        super().__setitem__(name, value)
        for other, default in LENGTHS.items() if name in LENGTHS else ():
            if other != name and other in self:
                super().__setitem__(other, default)


def replace_length(training: TrainingConfig, overridden: Sequence[str]) -> TrainingConfig:
    """Replaces the length of the config by one from the command line.

    Args:
      training: the ``training`` section with all overrides applied.
      overridden: keys set on the command line.

    Returns:
      The section with only the length from the command line, if there is one.

    Raises:
      JaxtuneError: the command line sets two lengths.
    """
    given = [name for name in LENGTHS if f"training.{name}" in overridden]
    if len(given) > 1:
        raise JaxtuneError(f"{_settings(training, given)}: a run has one length; set one of them")
    if not given or (given != ["steps"] and not getattr(training, given[0])):
        return training
    replaced = [name for name in _changed(training) if name not in given]
    if replaced:
        new, old = _settings(training, given), _settings(training, replaced)
        _log.info("%s replaces %s of the config", new, old)
    defaults = {name: default for name, default in LENGTHS.items() if name not in given}
    return dataclasses.replace(training, **defaults)


def length_unit(training: TrainingConfig) -> str:
    """Returns the option that sets the length: ``steps``, ``epochs`` or ``tokens``."""
    return next((name for name in ("epochs", "tokens") if getattr(training, name)), "steps")


def check_length(training: TrainingConfig) -> None:
    """Raises if two lengths differ from their defaults."""
    given = _changed(training)
    if len(given) > 1:
        raise JaxtuneError(f"{_settings(training, given)}: a run has one length; set one of them")


def _changed(training: TrainingConfig) -> list[str]:
    """Returns the names of the lengths that differ from their defaults."""
    return [name for name, default in LENGTHS.items() if getattr(training, name) != default]


def _settings(training: TrainingConfig, names: Sequence[str]) -> str:
    return " and ".join(f"training.{name}={getattr(training, name)}" for name in names)


def divisors_of(number: int) -> list[int]:
    """Returns the divisors of a positive number in increasing order, in √number steps."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]
