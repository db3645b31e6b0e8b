"""Tracebacks of a failed save, which its caller gets as one error, are not printed; others are."""

import asyncio
import logging
import sys
from types import SimpleNamespace

import pytest

from jaxtune.runs.quiet_saves import quiet_saves


def late_write():
    """What Python gets when code outside of it reports a result to a closed event loop."""
    loop = asyncio.new_event_loop()
    loop.close()
    with pytest.raises(RuntimeError, match="Event loop is closed") as error:
        loop.call_soon_threadsafe(print)
    trace = error.value.__traceback__.tb_next  # without the frame of this function
    return SimpleNamespace(exc_value=error.value, exc_traceback=trace)


def another_error():
    """The same error, from code in Python."""
    late = late_write()
    trace = late.exc_traceback.tb_next
    return SimpleNamespace(exc_value=late.exc_value, exc_traceback=trace)


def log(path, error):
    logger = logging.getLogger("absl")
    record = logger.makeRecord("absl", logging.ERROR, path, 1, "failed", (), error)
    logger.handle(record)


def test_only_errors_that_the_caller_gets_are_silenced(caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    error = (ValueError, ValueError("x"), None)
    with quiet_saves():
        with quiet_saves():  # a run that continues another one reads its checkpoints
            pass
        sys.unraisablehook(late_write())
        log("site-packages/orbax/checkpoint/future.py", error)
        assert not shown and not caplog.records
        sys.unraisablehook(another_error())
        log("site-packages/orbax/checkpoint/future.py", None)
        log("site-packages/other/future.py", error)
        assert len(shown) == 1 and len(caplog.records) == 2
    sys.unraisablehook(late_write())
    log("site-packages/orbax/checkpoint/future.py", error)
    assert len(shown) == 2 and len(caplog.records) == 3
