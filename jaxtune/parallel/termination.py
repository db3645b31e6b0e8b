"""SIGTERM and Ctrl-C while there is nothing to save: the process ends within seconds.

Python runs a signal handler only between two instructions of the main thread, which a compilation
or a large tokenization delays by minutes. The handler in C, however, writes to a pipe at once. A
thread reads it, gives the main thread a moment to clean up, and then ends the process.

This module imports no jax, so that it can be active before jax is imported.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

GRACE_SECONDS = 2.5  # for the main thread to clean up
_POLL_SECONDS = 0.05
_HANG_SECONDS = 2.0  # for the first thread that ends the process, before another one does
# Exit code and message by signal.
_ENDS: dict[int, tuple[int, str]] = {
    signal.SIGTERM: (75, "stopped by SIGTERM, with nothing to save; run the same command again"),
    signal.SIGINT: (130, "interrupted"),
}


class Terminated(BaseException):
    """Raised in the main thread by SIGTERM; like KeyboardInterrupt, it is not an Exception."""


End = Callable[[int, str], NoReturn]
"""Prints a line and exits with a code, at once."""


def _end_alone(code: int, message: str) -> NoReturn:
    print("jaxtune: error:", message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


class _Guard:
    """The handlers of SIGTERM and SIGINT, and the thread that ends the process."""

    def __init__(self) -> None:
        self.end: End = _end_alone
        self.active = True
        self.received: int | None = None
        self._ending = threading.Lock()
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        for number in _ENDS:
            # A shell starts commands in the background with SIGINT ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._raise)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="termination", daemon=True).start()

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self.active:
            if self.received is None and _imports(frame):
                return  # `_watch` tries again
            self.received = number
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)  # the clean-up is not interrupted again
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _watch(self) -> None:
        numbers: set[int] = set()
        while not numbers:
            numbers = set(os.read(self._pipe, 16)) & _ENDS.keys()
        number, main = numbers.pop(), threading.main_thread().ident
        assert main is not None
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            if self.active and self.received is None:
                # The system may have given the signal to a thread other than the main one, which
                # then sleeps on.
                signal.pthread_kill(main, number)
            time.sleep(_POLL_SECONDS)
        if self.active:
            self.received = self.received or number
            self.finish()

    def finish(self) -> NoReturn:
        """Ends the process; whichever thread comes first prints the message."""
        code, message = _ENDS[self.received or signal.SIGTERM]
        if self._ending.acquire(blocking=False):
            self.end(code, message)
        time.sleep(_HANG_SECONDS)
        os._exit(code)


def _imports(frame: FrameType | None) -> bool:
    """Returns whether the stack of a frame contains an import.

    An exception in the middle of one may leave C++ code that must not throw, which aborts.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


_guard: _Guard | None = None


def install() -> None:
    """Lets SIGTERM and Ctrl-C end this process, until `release`; called by the main thread."""
    global _guard
    if _guard is None:
        _guard = _Guard()


def installed() -> bool:
    """Returns whether `install` was called and `release` was not."""
    return _guard is not None and _guard.active


def end_by(end: End) -> None:
    """Sets the function that ends the process, such as one that tells other processes."""
    if _guard is not None:
        _guard.end = end


def finish_if_received() -> None:
    """Ends the process if a signal was received; called at the end of a command that failed.

    The main thread may arrive there with any exception: an import of C code, for example, turns
    `Terminated` into ImportError.
    """
    if _guard is not None and _guard.active and _guard.received is not None:
        _guard.finish()


def release() -> None:
    """Leaves signals to others: from now on the steps of a run look for SIGTERM."""
    if _guard is not None:
        _guard.active = False


_masks = threading.local()  # of the thread that forks


def _hold() -> None:
    """Delays signals during a fork: the new process would write them to the pipe of its parent."""
    if _guard is not None:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)


def _resume() -> None:
    """Restores the signals that the thread had blocked before the fork."""
    if _guard is not None and hasattr(_masks, "before"):
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)
        del _masks.before


def _forget() -> None:
    """Restores the default handlers in a forked process."""
    global _guard
    if _guard is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _resume()
        _guard = None


os.register_at_fork(before=_hold, after_in_parent=_resume, after_in_child=_forget)
