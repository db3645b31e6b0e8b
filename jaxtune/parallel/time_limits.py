"""Limits on the duration of actions that nothing can interrupt, such as writing to a disk."""

from __future__ import annotations

import threading
import time

from jaxtune.parallel import failures


class TimeLimit:
    """A time limit, which ends all processes of the run with exit code 75."""

    def __init__(self, minutes: float, message: str):
        """Starts the limit.

        Args:
          minutes: time until the end; 0: no limit.
          message: the reason, in one line; the stacks of all threads are printed before it.
        """
        self._seconds, self._message = 60 * minutes, message
        self._ended = threading.Event()
        self.restart()
        if minutes:
            threading.Thread(target=self._watch, name="time limit", daemon=True).start()

    def restart(self) -> None:
        """Starts the time again, because there is progress."""
        self._deadline = time.monotonic() + self._seconds

    def end(self) -> None:
        """Ends the limit."""
        self._ended.set()

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        failures.fail(75, self._message, stacks=True)
