"""Progress bars of work that is usually too short to need one."""

from __future__ import annotations

import contextlib
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_SECONDS_BEFORE = 2.0


class LateBar:
    """A bar that appears on a terminal once the work has taken two seconds; a context manager."""

    def __init__(self, description: str, *, total: int | None = None, shown: bool = True):
        """Starts the clock.

        Args:
          description: stands before the bar.
          total: rows there are; None: unknown.
          shown: False for no bar at all.
        """
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,} rows"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task(description, total=total)
        self._stack = contextlib.ExitStack()
        self._shown = self._waiting = shown and console.is_terminal
        self._begin = time.monotonic()

    def __enter__(self) -> LateBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)

    def advance(self, rows: int = 1) -> None:
        """Counts rows that are done."""
        if not self._shown:
            return
        if self._waiting and time.monotonic() - self._begin > _SECONDS_BEFORE:
            self._stack.enter_context(self._bar)
            self._waiting = False
        self._bar.advance(self._task, rows)
