"""Rendering of untrusted chat templates in a process with limits on time, memory and output.

There is one such process for each process of jaxtune. It starts at the first rendering, is shared
by all templates and threads, and ends with its parent. A template that exceeds a limit ends it; the
next rendering starts another one. See docs/decisions/2026-11-29-template-process.md.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.chats import template_worker
from jaxtune.chats.template_worker import HEADER_BYTES, decode, encode

SECONDS = 4.0  # for a rendering; a conversation takes milliseconds
MEMORY = 768 * 2**20  # bytes, in addition to those of the started process
CHARACTERS = 64 * 2**20  # of a rendering
_LIMITS = {
    "memory": f"needs more than {MEMORY >> 20} MiB of memory",
    "characters": f"writes more than {CHARACTERS:,} characters",
}
_START_SECONDS = 120.0  # importing transformers from a slow disk
_TEMPLATES = 64  # that the process keeps
# Values that the process needs to start, and that templates may print (the time zone).
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONHOME", "TZ")


class RenderingError(Exception):
    """An error that a template has raised.

    Attributes:
      kind: name of the type of the error, such as ``TemplateSyntaxError``.
      line: line of a syntax error; None for other errors.
    """

    def __init__(self, message: str, kind: str, line: int | None):
        """Initializes from the message, the name of the type and the line."""
        super().__init__(message or kind)
        self.kind, self.line = kind, line


class LimitExceeded(Exception):
    """Raised if a template exceeds a limit, which the message names."""


@dataclasses.dataclass(frozen=True)
class Request:
    """Renderings of the first turns of a conversation.

    Attributes:
      source: Jinja source.
      turns: turns of the conversation.
      wanted: number of turns and whether to add a generation prompt, for each rendering.
      tools: JSON schemas of functions.
      arguments: template arguments, including special tokens.
    """

    source: str
    turns: Sequence[Mapping[str, Any]]
    wanted: Sequence[tuple[int, bool]]
    tools: Sequence[Any] | None = None
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Process:
    """The running process and the templates that it knows; for one thread at a time."""

    def __init__(self) -> None:
        kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # Without user directories and environment variables, which -I excludes.
        self._process = subprocess.Popen(
            [sys.executable, "-I", template_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | {"OPENBLAS_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
            cwd="/",
            start_new_session=True,  # Ctrl-C of a terminal does not reach it
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self._in, self._out):
            os.set_blocking(pipe, False)
        self._known: dict[str, int] = {}
        self._unread = bytearray()
        path = [str(Path(entry).absolute()) for entry in sys.path if entry]
        limits = {"seconds": SECONDS, "memory": MEMORY, "characters": CHARACTERS}
        self._send(encode({"path": path, **limits}), time.monotonic() + SECONDS)
        self._ready = False

    def answers(self, body: bytes, source: str, count: int) -> Iterator[Any]:
        """Yields the answers to a request of `count` parts.

        Args:
          body: encoded request.
          source: template that it refers to; empty: none.
          count: number of answers.
        """
        if not self._ready:
            answer = self._receive(time.monotonic() + _START_SECONDS)
            if not answer.get("ready"):
                raise RuntimeError(f"{answer.get('type')}: {answer.get('error')}")
            self._ready = True
        template: dict[str, Any] = {}
        if source:
            if source not in self._known:
                if len(self._known) == _TEMPLATES:
                    self._known.clear()
                self._known[source] = len(self._known)
                template["source"] = source
            template["key"] = self._known[source]
        self._send(encode(template) + body, time.monotonic() + SECONDS)
        for _ in range(count):
            yield self._receive(time.monotonic() + SECONDS)

    def _send(self, content: bytes, deadline: float) -> None:
        rest = memoryview(content)
        while rest:
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self._in, rest[: 2**20]) :]
                continue
            self._wait(self._in, select.POLLOUT, deadline)

    def _receive(self, deadline: float) -> dict[str, Any]:
        size = int.from_bytes(self._read(HEADER_BYTES, deadline), "little")
        if size > 8 * CHARACTERS:  # four bytes of a character, or escapes
            raise LimitExceeded("sent an invalid answer")
        return decode(self._read(size, deadline))

    def _read(self, size: int, deadline: float) -> bytes:
        while len(self._unread) < size:
            self._wait(self._out, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                part = os.read(self._out, 2**20)
                if not part:
                    raise BrokenPipeError
                self._unread += part
        content = bytes(self._unread[:size])
        del self._unread[:size]
        return content

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError

    def end(self) -> int:
        """Kills the process and returns its exit code, which is another one if it has ended."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.kill()
        return self._process.wait()

    def ended(self) -> bool:
        """Returns whether the process has ended, for example because the system killed it."""
        return self._process.poll() is not None

    def forget(self) -> None:
        """Closes the pipes in a forked process, which must not use or end the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.returncode = 0  # it is not a child of this process


_lock = threading.Lock()
_process: _Process | None = None


def render(request: Request) -> list[str | RenderingError]:
    """Returns the text, or the error that the template has raised, of each wanted rendering.

    Raises:
      LimitExceeded: the template exceeds a limit.
      TypeError, ValueError, RecursionError: a turn or an argument cannot be written as JSON.
    """
    body = {
        "turns": request.turns[: max((count for count, _ in request.wanted), default=0)],
        "wanted": request.wanted,
        "tools": request.tools,
        "arguments": request.arguments,
    }
    answers = _ask(encode(body, _plain), request.source, len(request.wanted))
    return [
        answer["text"]
        if "text" in answer
        else RenderingError(answer["error"], answer["type"], answer["line"])
        for answer in answers
    ]


@functools.lru_cache(maxsize=32)
def percent_literals(source: str) -> tuple[str, ...]:
    """Returns the string literals of a template that contain a percent sign.

    Raises:
      LimitExceeded: finding them exceeds a limit.
    """
    (answer,) = _ask(encode({"literals": source}), "", 1)
    return tuple(answer.get("literals", ()))


def _plain(value: Any) -> Any:
    """Returns what a template sees of an object that JSON lacks, as in `transformers`."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    return f"<{type(value).__name__}>"


def _ask(body: bytes, source: str, count: int) -> list[dict[str, Any]]:
    """Returns the answers to a request; starts the process if it does not run."""
    with _lock:
        process = _running()
        try:
            answers = list(process.answers(body, source, count))
        except TimeoutError:
            end()
            raise LimitExceeded(f"takes more than {SECONDS:g} seconds") from None
        except BrokenPipeError:
            code = process.end()
            end()
            raise LimitExceeded(f"ends its process ({_exit_reason(code)})") from None
        except BaseException:  # an interrupt: answers to this request may still come
            end()
            raise
        for answer in answers:
            if "limit" in answer:
                end()  # the process may keep what it has allocated
                raise LimitExceeded(_LIMITS[answer["limit"]])
    return answers


def _exit_reason(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _running() -> _Process:
    global _process
    if _process is None or _process.ended():
        end()
        _process = _Process()
    return _process


def start() -> None:
    """Starts the process, unless it runs, without waiting until it is ready."""
    with _lock:
        _running()


def end() -> None:
    """Ends the process, if it runs."""
    global _process
    if _process is not None:
        _process.end()
        _process = None


def _forget() -> None:
    global _process, _lock
    if _process is not None:
        _process.forget()
    _process, _lock = None, threading.Lock()


atexit.register(end)
os.register_at_fork(after_in_child=_forget)
