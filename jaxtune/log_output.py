"""Log output of jaxtune: what the command line shows, for programs and notebooks as well."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

LOGGER = logging.getLogger("jaxtune")


class StderrHandler(logging.StreamHandler):
    """A handler that writes to the current sys.stderr, which a progress bar replaces.

    Warnings and errors are prefixed with their level.
    """

    def __init__(self) -> None:
        """Sets the format of the lines."""
        super().__init__()
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record."""
        self.setStream(sys.stderr)
        super().emit(record)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def enable_logging(level: int | str = logging.INFO) -> None:
    """Shows jaxtune's log as the command line does, on standard error.

    Handlers that the program has set up for the logger ``jaxtune``, or for all loggers, receive the
    messages instead; a plain `logging.StreamHandler` for all loggers does not count, because
    packages add one when they are imported. Calling the function again changes only the level.

    Args:
      level: lowest level shown, as in `logging`, such as ``"WARNING"``.
    """
    LOGGER.setLevel(level)
    others = (type(handler) is not logging.StreamHandler for handler in logging.root.handlers)
    if not LOGGER.handlers and not any(others):
        LOGGER.addHandler(StderrHandler())
        LOGGER.propagate = False  # or the plain handler would show the messages again


@contextlib.contextmanager
def logged(enabled: bool = True) -> Iterator[None]:
    """Shows jaxtune's log within the block, unless the program has set a level for it.

    Args:
      enabled: False to change nothing.
    """
    if not enabled or LOGGER.level != logging.NOTSET:
        yield
        return
    handlers, propagate = list(LOGGER.handlers), LOGGER.propagate
    enable_logging()
    try:
        yield
    finally:
        LOGGER.setLevel(logging.NOTSET)
        LOGGER.handlers[:], LOGGER.propagate = handlers, propagate
