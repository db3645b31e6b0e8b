"""How long a run is and when something is due in it, whatever unit that was given in."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtune.intervals import parse_interval
from jaxtune.parallel.processes import agree

_BATCHES = 256  # that a long epoch is measured by
_INTERVALS = ("checkpoint", "evaluation", "logging")


class Rates(NamedTuple):
    """How the data fill the updates of a run.

    Attributes:
      steps_per_epoch: updates that see as many examples as there are.
      tokens_per_step: tokens of a batch on average, padding not counted.
    """

    steps_per_epoch: float
    tokens_per_step: float


def needs_rates(config: Any) -> bool:
    """Says whether a config counts anything in epochs or tokens."""
    intervals = (parse_interval(f"{name}.every", config[name].every) for name in _INTERVALS)
    counted = any(interval.unit in ("epochs", "tokens") for interval in intervals)
    return bool(counted or config.training.epochs or config.training.tokens)


def measure_rates(batches: Iterator[Mapping[str, np.ndarray]], examples: int) -> Rates:
    """Measures the stream that a run is going to see, from its beginning.

    Args:
      batches: a fresh stream of int[rows, T] arrays, ``segment_ids`` among them. It is a function
        of data, config and seed, so that a run that goes on finds the same rates.
      examples: how many there are. After one pass, or 256 batches of a longer one, the rest is
        taken to be alike.
    """
    drawn = tokens = steps = 0
    for batch in batches:
        segments = batch["segment_ids"]
        drawn += int(segments.max(axis=1).sum())  # they count from 1 in each row
        tokens += int(np.count_nonzero(segments))
        steps += 1
        if drawn >= examples or steps == _BATCHES:
            break
    return Rates(examples * steps / drawn, tokens / steps)


def total_steps(training: Any, rates: Rates | None) -> int:
    """Returns the updates of a run.

    Args:
      training: the ``training`` section.
      rates: of the data; None where nothing is counted in epochs or tokens.
    """
    if training.epochs and rates:
        return max(1, math.ceil(training.epochs * rates.steps_per_epoch - 1e-6))
    if training.tokens and rates:
        return max(1, math.ceil(training.tokens / rates.tokens_per_step - 1e-6))
    return training.steps


class Due:
    """Says after which updates something is due."""

    def __init__(self, key: str, value: int | str, rates: Rates | None = None):
        """Starts the clock of an interval in minutes; any other is a matter of the steps alone.

        Args:
          key: of the config, for messages.
          value: what `parse_interval` reads; 0 is never.
          rates: for epochs and tokens.
        """
        amount, unit = parse_interval(key, value)
        self.never = amount == 0
        self._seconds = 60 * amount if unit == "minutes" else None
        self._since = time.monotonic()
        if unit in ("epochs", "tokens"):
            assert rates is not None, f"{key} is counted in {unit}, which nobody has measured"
            per_unit = {"epochs": rates.steps_per_epoch, "tokens": 1 / rates.tokens_per_step}
            amount *= per_unit[unit]
        self._period = max(amount, 1.0)

    def __call__(self, number: int) -> bool:
        """Says whether it is due after update `number`, of which each is asked about in order."""
        if self.never:
            return False
        if self._seconds is None:
            return self._periods(number) > self._periods(number - 1)
        # The clocks of several processes differ, and all have to do the same.
        due = bool(agree(time.monotonic() - self._since >= self._seconds))
        if due:
            self._since = time.monotonic()
        return due

    def _periods(self, number: int) -> int:
        return math.floor(number / self._period + 1e-9)
