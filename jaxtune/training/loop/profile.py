"""Profiling of a window of steps with JAX's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import JaxtuneError

logger = logging.getLogger(__name__)


class Profile:
    """A context manager that writes a trace of a window of steps, for XProf or TensorBoard."""

    def __init__(self, steps: tuple[str, ...], directory: Path):
        """Prepares a trace.

        Args:
          steps: ``profile.steps``: first and last step, or empty.
          directory: directory of the trace.

        Raises:
          JaxtuneError: `steps` are not two numbers in ascending order.
        """
        self._directory, self._running, self._asked = directory, False, False
        self._first, self._last = profile_window(steps)

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def before(self, number: int) -> None:
        """Starts the trace before its first step.

        A run that resumes within the window traces the rest of it, and one that resumes after it
        logs that there is no trace.
        """
        if not self._running and self._first <= number <= self._last:
            jax.profiler.start_trace(self._directory)
            self._running = True
        if not self._asked and self._first < number and self._last:
            window = f"profile.steps={self._first},{self._last}"
            what = f"tracing steps {number} to {self._last}" if self._running else "no trace"
            logger.info("%s: the run resumes after step %d: %s", window, number - 1, what)
        self._asked = True

    def after(self, number: int, state: Any) -> None:
        """Ends the trace if `number` is its last step, whose result is `state`."""
        if self._running and number >= self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logger.info("wrote a profile to %s", self._directory)


def profile_window(steps: tuple[str, ...]) -> tuple[int, int]:
    """Reads ``profile.steps``.

    Raises:
      JaxtuneError: `steps` are not two numbers in ascending order.
    """
    if not steps:
        return 0, 0
    numbers = [int(step) for step in steps if step.isdecimal()]
    if len(numbers) != 2 or len(steps) != 2 or not 0 < numbers[0] <= numbers[1]:
        raise JaxtuneError(
            f"profile.steps takes the first and last step, such as 10,20, not {','.join(steps)}"
        )
    return numbers[0], numbers[1]
