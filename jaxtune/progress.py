"""A progress bar for whatever takes longer than two seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def track(total: int | None, what: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """Yields a function that counts what is done, one by default; a bar appears after a while.

    It appears on standard error, if that is a terminal: what a program prints stays clean.

    Args:
      total: how many there are; None: unknown.
      what: stands before the bar.
      enabled: False for no bar at all.
    """
    console = Console(stderr=True)
    known = (MofNCompleteColumn(), TimeRemainingColumn())
    unknown = (TextColumn("{task.completed:,}"), TimeElapsedColumn())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *(unknown if total is None else known),
        console=console,
        transient=True,
    )
    task = bar.add_task(what, total=total)
    visible = enabled and console.is_terminal
    started, shown = time.monotonic(), False

    def advance(count: int = 1) -> None:
        nonlocal shown
        if not visible:
            return
        bar.advance(task, count)
        if not shown and time.monotonic() - started > PATIENCE_SECONDS:
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
