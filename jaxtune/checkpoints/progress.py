"""A progress bar for whatever takes longer than two seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PATIENCE_SECONDS = 2.0


@contextlib.contextmanager
def track(total: int, what: str, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """Yields a function to call once for each of `total` steps; a bar appears after a while.

    It appears on standard error, if that is a terminal: what a program prints stays clean.
    """
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(what, total=total)
    started, shown = time.monotonic(), False

    def advance() -> None:
        nonlocal shown
        bar.advance(task)
        if (
            enabled
            and console.is_terminal
            and not shown
            and time.monotonic() - started > PATIENCE_SECONDS
        ):
            bar.start()
            shown = True

    try:
        yield advance
    finally:
        if shown:
            bar.stop()
