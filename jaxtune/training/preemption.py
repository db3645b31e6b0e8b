"""What ends a run from outside: a machine that is taken away, and one that is stuck."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from jaxtune.parallel import failures
from jaxtune.parallel.failures import Preempted

__all__ = ["Preempted", "Watchdog", "preempted", "watchdog"]


def preempted(step: int) -> bool:
    """Returns whether SIGTERM reached any process and this is the step that all save.

    Every process calls this after every step. Without `jax.distributed.initialize`, which the
    command line calls, nothing listens to SIGTERM, and the result is False.

    Args:
      step: number of the update that is done.
    """
    return jax.distributed.is_initialized() and multihost_utils.reached_preemption_sync_point(step)


class Watchdog:
    """Ends all processes of a run with 75 when one of them makes no step for a time."""

    def __init__(self, seconds: float):
        """Makes a watchdog that starts at the first `step`, after loading and compilation.

        Args:
          seconds: between two steps, evaluation and saving included; 0: it never bites.
        """
        self._seconds = seconds
        self._last: float | None = None
        self._stopped = threading.Event()

    def step(self) -> None:
        """Reports a finished step."""
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
                    f"no step for {silent:.0f} seconds (training.watchdog_minutes); what every "
                    "thread was doing is above",
                    stacks=True,
                )


@contextlib.contextmanager
def watchdog(minutes: float) -> Iterator[Watchdog]:
    """Keeps a `Watchdog` for the time of the block."""
    dog = Watchdog(minutes * 60)
    try:
        yield dog
    finally:
        dog.stop()
