"""Keeps Orbax and TensorStore from printing the errors of a save, which the caller gets anyway.

When one write of a save fails, Orbax closes the event loop of its thread while other writes are in
progress. As these end, TensorStore finds the loop closed and prints a traceback for each, through
`sys.unraisablehook`. Before that, Orbax's threads log the traceback of the error that they raise
again in the thread that waits for the save.
"""

from __future__ import annotations

import asyncio.base_events
import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_saves() -> Iterator[None]:
    """Silences these errors for the duration of the block, and no others."""
    plain = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not _is_late_write(unraisable):
            plain(unraisable)

    def is_not_repeated(record: logging.LogRecord) -> bool:
        # A function for each block, because a logger holds equal filters once and blocks nest.
        return record.exc_info is None or "orbax" not in record.pathname

    logger = logging.getLogger("absl")
    sys.unraisablehook = hook
    logger.addFilter(is_not_repeated)
    try:
        yield
    finally:
        logger.removeFilter(is_not_repeated)
        if sys.unraisablehook is hook:
            sys.unraisablehook = plain


def _is_late_write(unraisable: sys.UnraisableHookArgs) -> bool:
    """Returns whether code outside of Python has reported a result to a closed event loop."""
    trace = unraisable.exc_traceback
    reports = asyncio.base_events.BaseEventLoop.call_soon_threadsafe
    return (
        str(unraisable.exc_value) == "Event loop is closed"
        and trace is not None
        and trace.tb_frame.f_code is reports.__code__
    )
