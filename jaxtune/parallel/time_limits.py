"""Limits on the duration of actions that nothing can interrupt, such as writing to a disk."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from jaxtune.parallel import failures


def start_time_limit(minutes: float, message: str) -> threading.Timer:
    """Starts a time limit, which ends all processes of the run with exit code 75.

    Args:
      minutes: time until then; 0: no limit.
      message: the reason, in one line; the stacks of all threads are printed before it.

    Returns:
      A timer, whose `cancel` ends the limit.
    """
    timer = threading.Timer(60 * minutes, failures.fail, (75, message), {"stacks": True})
    timer.name, timer.daemon = "time limit", True
    if minutes:
        timer.start()
    return timer


@contextlib.contextmanager
def time_limit(minutes: float, message: str) -> Iterator[None]:
    """Limits the duration of the block; see `start_time_limit`."""
    timer = start_time_limit(minutes, message)
    try:
        yield
    finally:
        timer.cancel()
