"""Output of a run in progress: metrics, warnings, and a progress bar or progress lines."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxtune.config import Config
from jaxtune.errors import JaxtuneError
from jaxtune.progress import Bar
from jaxtune.runs.metrics import MetricLog
from jaxtune.training.bad_steps import OVERFLOW, REASONS
from jaxtune.training.durations import Due, Timeline
from jaxtune.training.loop.callbacks import Callbacks
from jaxtune.training.loop.early_stopping import Tally

logger = logging.getLogger(__name__)

_ESTIMATED_BY = 3  # steps that are timed to estimate the duration of the run
SECONDS_BETWEEN_LINES = 30.0  # between progress lines, without a terminal


class Recorder:
    """Reads and logs the metrics of each step.

    Metrics are read one step late. JAX dispatches steps asynchronously and reading a metric waits
    for its step, so the next step is queued first and the device does not idle.
    """

    def __init__(
        self,
        log: MetricLog,
        display: Display,
        tally: Tally,
        config: Config,
        steps: int,
        timeline: Timeline | None,
        callbacks: Callbacks,
    ):
        """Starts the clock of the throughput.

        Args:
          log: metric files.
          display: progress bar or lines.
          tally: counters of the run, updated in place.
          config: resolved config; the logging interval and the limit of skipped steps are used.
          steps: number of steps of the run.
          timeline: progress through the data, for intervals in epochs or tokens.
          callbacks: callbacks of the user, called with the metrics of each step.
        """
        self._callbacks = callbacks
        self._log, self._display, self._tally = log, display, tally
        self._due = Due("logging.every", config.logging.every, timeline)
        self._max_bad = config.training.max_bad_steps
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens, self._clock = 0, time.monotonic()  # since the last line
        self._waited, self._batch, self._rows = 0.0, None, 0
        self._first: tuple[int, float] | None = None  # number and time of the first step
        self._steps = steps

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Adds the time of the block to the time spent waiting for data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def put(
        self, number: int, metrics: Mapping[str, jax.Array], batch: Any = None, rows: int = 0
    ) -> None:
        """Queues the metrics of a step that may still be running; reads those of the previous step.

        Args:
          number: number of the step.
          metrics: metrics of the step, scalars.
          batch: pytree of NumPy arrays of any shape, the batch of the step; its hash is logged.
          rows: number of data rows shown so far.
        """
        self.flush()
        self._pending, self._batch, self._rows = (number, metrics), batch, rows

    def flush(self) -> None:
        """Waits for the queued step, checks its metrics and logs them.

        Raises:
          JaxtuneError: an applied step has a metric that is not finite, or too many steps in a row
            were skipped.
        """
        if self._pending is None:
            return
        (number, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        # jit returns dicts with sorted keys; the loss comes first in every output.
        values = {"loss": values["loss"], **values}
        outcome = int(values.pop("skipped", 0))
        reason = REASONS.get(outcome)
        if reason is None:
            check_finite(number, values)
            self._tally.bad_in_a_row = 0
        tokens = int(values["tokens"])
        self._tally.tokens += tokens
        self._tokens += tokens
        elapsed = max(time.monotonic() - self._clock, 1e-9)
        speed = self._tokens / elapsed
        values |= {
            "tokens": self._tally.tokens,
            "rows": self._rows,
            "tokens_per_second": speed,
            "data_wait": min(self._waited / elapsed, 1.0),
        }
        self._display.show(number, values["loss"], speed)
        self._estimate(number)
        if self._due(number):
            line: dict[str, Any] = values
            if reason is not None:
                # JSON has no literals for NaN and infinity.
                line = {k: v if math.isfinite(v) else None for k, v in values.items()}
                line["skipped"] = reason
            line = line | {"batch": _hash(self._batch)}
            self._log.train(number, line)
            self._tokens, self._clock, self._waited = 0, time.monotonic(), 0.0
        skipped: dict[str, Any] = {}
        if reason is not None:
            self._skipped(number, outcome, reason, values)
            skipped = {"skipped": reason}
        self._callbacks.on_step(number, values | skipped)

    def _estimate(self, number: int) -> None:
        """Logs the expected duration of the run once, from the first steps after compilation."""
        if self._first is None:
            self._first = (number, time.monotonic())
        elif number == self._first[0] + _ESTIMATED_BY < self._steps:
            each = (time.monotonic() - self._first[1]) / _ESTIMATED_BY
            left = each * (self._steps - number)
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + left))
            logger.info(
                "%.3g s per step: about %.1f minutes left, until %s, plus evaluations",
                each,
                left / 60,
                end,
            )

    def _skipped(self, number: int, outcome: int, reason: str, values: dict[str, float]) -> None:
        """Counts and logs a skipped step; raises after too many in a row."""
        tally = self._tally
        tally.skipped[reason] = tally.skipped.get(reason, 0) + 1
        numbers = f"loss {values['loss']:.6g}, grad_norm {values['grad_norm']:.6g}"
        if outcome == OVERFLOW:
            # Expected while the loss scale adapts, so it does not count as a bad step.
            numbers += f", at a loss scale of {values['loss_scale']:g}, which is halved"
        else:
            tally.bad_in_a_row += 1
        logger.warning(
            "step %d skipped (%s: %s); %d so far",
            number,
            reason,
            numbers,
            tally.skipped[reason],
        )
        if tally.bad_in_a_row >= self._max_bad:
            raise JaxtuneError(
                f"step {number}: {reason}: {numbers}; stopped after training.max_bad_steps="
                f"{self._max_bad} skipped steps in a row, none of which was saved (a lower "
                "optimizer.learning_rate or optimizer.clip_norm may help)"
            )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Flushes, and excludes the time of the block from the throughput."""
        self.flush()
        begin = time.monotonic()
        yield
        self._clock += time.monotonic() - begin


class Display:
    """A progress bar on a terminal; otherwise a log line at intervals."""

    def __init__(self, start: int, steps: int):
        """Prepares the bar of a run of `steps` steps that resumes after step `start`."""
        self._steps = steps
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            transient=False,
        )
        # Monotonic time of the next progress line; never with a bar.
        self._due = 0.0 if self._bar.disable else math.inf
        self._task = self._bar.add_task(
            "train", total=steps, completed=start, loss=math.nan, speed=0.0
        )

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, number: int, loss: float, speed: float) -> None:
        """Shows step `number` as completed, with its loss and the tokens per second."""
        self._bar.update(self._task, completed=number, loss=loss, speed=speed)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + SECONDS_BETWEEN_LINES
            logger.info("step %d/%d: loss %.4f, %.0f tokens/s", number, self._steps, loss, speed)


def _hash(batch: Any) -> str:
    """Returns the CRC-32 of a batch as 8 hexadecimal digits."""
    checksum = 0
    for leaf in jax.tree.leaves(batch):
        checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
    return f"{checksum:08x}"


def check_finite(number: int, values: Mapping[str, float], prefix: str = "") -> None:
    """Raises if a metric is not finite.

    Args:
      number: number of the step, for the message.
      values: metrics by name.
      prefix: text in front of the metric's name in the message.

    Raises:
      JaxtuneError: a metric is not finite; the message names it.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise JaxtuneError(
                f"step {number}: {prefix}{name} is {value}; stopped before the step was saved "
                "(a lower optimizer.learning_rate or optimizer.clip_norm may help)"
            )
