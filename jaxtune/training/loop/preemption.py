"""Preemption of a machine, and a watchdog for processes that are stuck."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from jax.experimental import multihost_utils

from jaxtune.parallel import failures
from jaxtune.parallel.failures import Preempted
from jaxtune.parallel.processes import listen_for_notices

__all__ = ["Preempted", "Watchdog", "preempted", "watchdog"]


def preempted(step: int) -> bool:
    """Returns whether SIGTERM reached any process and this is the step that all save.

    Every process calls it after every step; signals count from the first step on. It is always
    False without `jax.distributed.initialize`, which the command line calls.

    Args:
      step: number of the completed step.
    """
    return listen_for_notices() and multihost_utils.reached_preemption_sync_point(step)


class Watchdog:
    """Ends all processes of a run with exit code 75 if one of them makes no progress."""

    def __init__(self, seconds: float):
        """Creates a watchdog that starts at the first `step`, after loading and compilation.

        Args:
          seconds: maximum time between two steps, including evaluation and saving; 0: off.
        """
        self._seconds = seconds
        self._last: float | None = None
        self._stopped = threading.Event()

    def step(self) -> None:
        """Records a completed step."""
        if self._last is None and self._seconds:
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        self._last = time.monotonic()

    def stop(self) -> None:
        """Stops watching."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(self._seconds / 10, 5.0)):
            assert self._last is not None
            silent = time.monotonic() - self._last
            if silent > self._seconds:
                failures.fail(
                    75,
                    f"no step for {silent:.0f} seconds (training.watchdog_minutes); the "
                    "stack of every thread is above",
                    stacks=True,
                )


@contextlib.contextmanager
def watchdog(minutes: float) -> Iterator[Watchdog]:
    """Runs a `Watchdog` for the duration of the block."""
    dog = Watchdog(minutes * 60)
    try:
        yield dog
    finally:
        dog.stop()
