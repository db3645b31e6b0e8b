"""Length of a run and intervals within it, in steps, epochs, tokens or minutes."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from jaxtune.config import TrainingConfig
from jaxtune.data.passes import DataOrder
from jaxtune.errors import JaxtuneError
from jaxtune.intervals import parse_interval
from jaxtune.parallel.processes import agree
from jaxtune.progress import track

# `Timeline.describe` plans passes for a log line only, so it gives up after `_AHEAD` examples, a
# second or two. A pass counts `_PASS` examples more than it has, for the fixed cost of planning it.
_AHEAD, _PASS = 5_000_000, 200
_MOST_PASSES = 10_000


class Shown(NamedTuple):
    """The data shown to the model up to a step.

    Attributes:
      passes: number of passes; a pass in progress counts by the fraction of its steps.
      rows: number of examples, with repetitions.
      tokens: number of tokens of these examples, without padding.
    """

    passes: float
    rows: int
    tokens: int


class Timeline:
    """Exact progress through the data by step, computed from the lengths of the examples.

    Packing makes the number of steps differ between passes, so each pass is planned once, on demand
    and in order. `_ends[i]` and `_tokens[i]` are the total steps and tokens of the passes before
    pass `i`. A bisection finds the pass of a step or token; its plan has the position within it.
    """

    def __init__(self, order: DataOrder):
        """Initializes the timeline; no pass is planned yet."""
        self.order = order
        self._ends, self._tokens = [0], [0]  # steps and tokens before each pass

    def extend(self, advance: Callable[[int], None] | None = None) -> None:
        """Plans one more pass; `advance` is called with the number of examples planned."""
        number = len(self._ends) - 1
        plan = self.order.plan(number, advance)
        self._ends.append(self._ends[-1] + plan.steps)
        self._tokens.append(self._tokens[-1] + int(plan.tokens[-1]))

    def after(self, step: int) -> Shown:
        """Returns the data shown after `step` steps."""
        while self._ends[-1] < step:
            self.extend()
        number = bisect.bisect_left(self._ends, step)
        rows = self.order.rows_before(number)
        if self._ends[number] == step:
            return Shown(number, rows, self._tokens[number])
        number -= 1
        rows = self.order.rows_before(number)
        plan, within = self.order.plan(number), step - self._ends[number]
        return Shown(
            number + within / plan.steps,
            rows + int(plan.shown[within]),
            self._tokens[number] + int(plan.tokens[within]),
        )

    def total_steps(self, training: TrainingConfig) -> int:
        """Returns the number of steps of a run; at least one if given in epochs or tokens.

        A fraction of an epoch is rounded up to whole steps of its pass, and a number of tokens to
        the step that reaches it.

        Args:
          training: the ``training`` section.
        """
        if training.epochs:
            return self._steps_of_passes(training.epochs)
        if training.tokens:
            return self._steps_of_tokens(training.tokens)
        return training.steps

    def _steps_of_passes(self, epochs: float) -> int:
        # The small constants absorb rounding errors, as in 0.1 + 0.2 or 3 × 1/3 epochs.
        whole = math.floor(epochs + 1e-9)
        part = epochs - whole if epochs - whole > 1e-9 else 0.0
        passes = whole + (part > 0)
        with track(int(passes * self.order.rows_per_pass), "planning passes") as advance:
            while len(self._ends) <= passes:
                self._check_passes("training.epochs", epochs)
                self.extend(advance)
        last = self._ends[passes] - self._ends[whole]
        return max(1, self._ends[whole] + math.ceil(part * last - 1e-6))

    def _steps_of_tokens(self, tokens: int) -> int:
        with track(None, "planning passes") as advance:
            while self._tokens[-1] < tokens:
                self._check_passes("training.tokens", tokens)
                self.extend(advance)
        number = bisect.bisect_left(self._tokens, tokens) - 1
        within = self.order.plan(number).tokens.searchsorted(tokens - self._tokens[number])
        return max(1, self._ends[number] + int(within))

    def _check_passes(self, key: str, length: float) -> None:
        """Raises if planning the passes of a run would take long."""
        if len(self._ends) > _MOST_PASSES:
            raise JaxtuneError(
                f"{key}={length}: more than {_MOST_PASSES} passes over the data; give the length "
                "in training.steps"
            )

    def describe(self, steps: int) -> str:
        """Returns text: a run's length in steps and passes, and whether it ends within a pass."""
        rows, cost = self.order.rows_per_pass, 0
        with track(None, "planning passes") as advance:
            while self._ends[-1] < steps and (cost <= _AHEAD or len(self._ends) == 1):
                self.extend(advance)
                cost += rows + _PASS
        text = f"{steps} {_plural('step', steps)}"
        shown = f"{round(rows, 2)} {_plural('row', rows)}"
        if self._ends[-1] < steps:
            return f"{text}: more than {len(self._ends) - 1} passes over {shown}"
        number = bisect.bisect_left(self._ends, steps)
        whole = f"{number} {_plural('pass', number)} over {shown}"
        if self._ends[number] == steps:
            return f"{text}: {whole}"
        before, end = self._ends[number - 1 : number + 1]
        within = f"{steps - before} of the {end - before} steps"
        if number == 1:
            return f"{text}: {within} of a pass over {shown}, so it ends in the middle of a pass"
        whole = f"{number - 1} {_plural('pass', number - 1)} over {shown}"
        return f"{text}: {whole} and {within} of the next, so it ends in the middle of a pass"


def _plural(word: str, count: float) -> str:
    return word if count == 1 else f"{word}es" if word.endswith("s") else f"{word}s"


class Due:
    """An interval in steps, epochs, tokens or minutes, after which an event is due."""

    def __init__(self, key: str, value: int | str, timeline: Timeline | None = None):
        """Parses the interval; an interval in minutes begins now.

        Args:
          key: config key, for messages.
          value: interval in the syntax of `parse_interval`; 0: never.
          timeline: timeline of the run, for intervals in epochs or tokens.
        """
        self._amount, self._unit = parse_interval(key, value)
        self.never = self._amount == 0
        self._since = time.monotonic()
        if self._unit in ("epochs", "tokens"):
            assert timeline is not None, f"{key} is in {self._unit}, which need a timeline"
        self._timeline = timeline

    def __call__(self, number: int) -> bool:
        """Returns whether the event is due after step `number`; called for every step in order."""
        if self.never:
            return False
        if self._unit != "minutes":
            return self._periods(number) > self._periods(number - 1)
        # Clocks differ between processes, which all have to make the same decision.
        due = bool(agree(time.monotonic() - self._since >= 60 * self._amount))
        if due:
            self._since = time.monotonic()
        return due

    def _periods(self, number: int) -> int:
        """Returns the number of whole intervals up to step `number`."""
        done: float = number
        if self._timeline is not None and self._unit in ("epochs", "tokens"):
            shown = self._timeline.after(number)
            done = shown.passes if self._unit == "epochs" else shown.tokens
        return math.floor(done / self._amount + 1e-9)
