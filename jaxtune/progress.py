"""Progress bars, on standard error of a terminal or in a notebook; standard output stays clean."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import ClassVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PATIENCE_SECONDS = 2.0
_enabled = contextvars.ContextVar("enabled", default=True)


class Bar(Progress):
    """A progress bar, shown on a terminal or in a notebook that shows no other bar."""

    _shown: ClassVar[Bar | None] = None

    def __init__(self, *columns: ProgressColumn, enabled: bool = True, transient: bool = True):
        """Prepares the bar; `start` shows it.

        Args:
          columns: parts of the bar, from left to right.
          enabled: False for no bar at all.
          transient: removes the bar when it stops.
        """
        console = Console(stderr=True)
        disable = not (enabled and _enabled.get() and _shows_bars(console))
        # In a terminal, other output is written above the bar; a notebook's bar has its own place.
        redirect = not console.is_jupyter
        super().__init__(
            *columns,
            console=console,
            transient=transient,
            disable=disable,
            redirect_stdout=redirect,
            redirect_stderr=redirect,
        )

    def start(self) -> None:
        """Shows the bar, unless another one is on the terminal."""
        if not self.disable and Bar._shown is None:
            Bar._shown = self
            super().start()

    def stop(self) -> None:
        """Stops the bar, if it was shown."""
        if Bar._shown is self:
            Bar._shown = None
            super().stop()


def _shows_bars(console: Console) -> bool:
    """Returns whether a bar can be updated in place: on a terminal, or as a notebook's widget."""
    if console.is_jupyter:
        return all(importlib.util.find_spec(name) for name in ("IPython", "ipywidgets"))
    return console.is_terminal


@contextlib.contextmanager
def bars(enabled: bool) -> Iterator[None]:
    """Shows no progress bar within the block if `enabled` is False."""
    token = _enabled.set(enabled and _enabled.get())
    try:
        yield
    finally:
        _enabled.reset(token)


@contextlib.contextmanager
def track(total: int | None, what: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Yields a function that counts finished items, one by default.

    The bar appears once the block has taken `PATIENCE_SECONDS`.

    Args:
      total: number of items; None: unknown.
      what: label of the bar.
      enabled: False for no bar at all.
    """
    known = (MofNCompleteColumn(), TimeRemainingColumn())
    unknown = (TextColumn("{task.completed:,}"), TimeElapsedColumn())
    counts = unknown if total is None else known
    bar = Bar(TextColumn("{task.description}"), BarColumn(), *counts, enabled=enabled)
    task = bar.add_task(what, total=total)
    started = time.monotonic()

    def advance(count: int = 1) -> None:
        if bar.disable:
            return
        bar.advance(task, count)
        if time.monotonic() - started > PATIENCE_SECONDS:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
