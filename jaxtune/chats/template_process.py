"""Rendering of untrusted chat templates in a process with limits on time, memory and output.

There is one such process for each process of jaxtune. It starts at the first rendering, is shared
by all templates and threads, and ends with its parent. A template that exceeds a limit ends it; the
next rendering starts another one. See docs/decisions/2026-11-29-template-process.md.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.chats import template_worker
from jaxtune.chats.template_worker import HEADER_BYTES, decode, encode, message
from jaxtune.errors import JaxtuneError, Retry

SECONDS = 4.0  # for a rendering; a conversation takes milliseconds
MEMORY = 768 * 2**20  # bytes, in addition to those of the started process
CHARACTERS = 64 * 2**20  # of a rendering
_LIMITS = {
    "memory": f"needs more than {MEMORY >> 20} MiB of memory",
    "characters": f"writes more than {CHARACTERS:,} characters",
}
_MESSAGE_BYTES = 2**18  # of requests that are sent together, unless a single one is longer
_PAUSE_SECONDS = 1e-3  # between two reads of answers to several requests, to wake up less often
_START_SECONDS = 120.0  # importing transformers from a slow disk
_STALL_SECONDS = 60.0  # for a message, if the process gets no processor time
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


class LimitExceeded(JaxtuneError):
    """Raised if a template exceeds a limit, which the message names."""


Made = list[str | RenderingError]
"""The text, or the error that the template has raised, of each wanted rendering of a request."""


class Request(NamedTuple):
    """Renderings of the first turns of a conversation, encoded.

    Attributes:
      source: Jinja source; empty: the request needs no template.
      body: JSON.
      count: number of answers.
    """

    source: str
    body: bytes
    count: int

    @classmethod
    def of(
        cls,
        source: str,
        turns: Sequence[Mapping[str, Any]],
        wanted: Sequence[tuple[int, bool]],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Request:
        """Encodes a request.

        Args:
          source: Jinja source.
          turns: turns of the conversation.
          wanted: number of turns and whether to add a generation prompt, for each rendering.
          tools: JSON schemas of functions.
          arguments: template arguments, including special tokens.

        Raises:
          TypeError, ValueError, RecursionError: a turn or an argument cannot be written as JSON.
        """
        body = {
            "turns": turns[: max((count for count, _ in wanted), default=0)],
            "wanted": wanted,
            "tools": tools,
            "arguments": arguments or {},
        }
        return cls(source, encode(body, _plain), len(wanted))


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
        self._ready = False
        self._begin = time.monotonic(), 0.0
        with contextlib.suppress(BrokenPipeError):  # found by `_wait_until_ready`
            self._send(message(encode({"path": path, **limits})), time.monotonic() + SECONDS)

    def _wait_until_ready(self) -> None:
        try:
            answer = self._receive(time.monotonic() + _START_SECONDS)
        except (TimeoutError, BrokenPipeError):
            raise Retry("the process that renders chat templates does not start") from None
        if not answer.get("ready"):
            raise JaxtuneError(
                "the process that renders chat templates cannot be used: "
                f"{answer.get('type')}: {answer.get('error')}"
            )
        self._ready = True

    def answers(self, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """Sends requests together and yields their answers.

        ``later`` is the last answer if the remaining requests have to be sent again.
        """
        if not self._ready:
            self._wait_until_ready()
        self._begin = time.monotonic(), self._processor_seconds()
        pairs = [b"[%b,%b]" % (encode(self._template(r.source)), r.body) for r in requests]
        self._send(message(b"[%b]" % b",".join(pairs)), time.monotonic() + SECONDS)
        pause = _PAUSE_SECONDS if len(requests) > 1 else 0.0
        for _ in range(sum(request.count for request in requests)):
            answer = self._receive(time.monotonic() + SECONDS, pause)
            if "later" in answer:
                self._known.clear()  # it has not read the templates of the remaining requests
                yield answer
                return
            yield answer

    def _template(self, source: str) -> dict[str, Any]:
        """Returns the key of a template, and its source if the process does not know it."""
        if not source:
            return {}
        if source in self._known:
            return {"key": self._known[source]}
        if len(self._known) == _TEMPLATES:
            self._known.clear()
        self._known[source] = len(self._known)
        return {"key": self._known[source], "source": source}

    def _send(self, content: bytes, deadline: float) -> None:
        rest = memoryview(content)
        while rest:
            with contextlib.suppress(BlockingIOError):
                rest = rest[os.write(self._in, rest[: 2**20]) :]
                continue
            self._wait(self._in, select.POLLOUT, deadline)

    def _receive(self, deadline: float, pause: float = 0.0) -> dict[str, Any]:
        size = int.from_bytes(self._read(HEADER_BYTES, deadline, pause), "little")
        if size > 8 * CHARACTERS:  # four bytes of a character, or escapes
            raise LimitExceeded("sent an invalid answer")
        return decode(self._read(size, deadline, pause))

    def _read(self, size: int, deadline: float, pause: float) -> bytes:
        while len(self._unread) < size:
            if pause:
                time.sleep(pause)
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
        while not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not self._is_stalled():
                raise TimeoutError
            deadline = time.monotonic() + SECONDS

    def _is_stalled(self) -> bool:
        """Returns whether the machine, not the template, is slow: swapping or overloaded."""
        begin, used = self._begin
        if not self._ready or time.monotonic() - begin > _STALL_SECONDS:
            return False
        return self._processor_seconds() - used < SECONDS / 2

    def _processor_seconds(self) -> float:
        """Returns the processor time of the process; infinite where the system does not tell."""
        try:
            content = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return math.inf
        ticks = content.rpartition(")")[2].split()[11:13]  # the name may contain anything
        return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

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


def render(request: Request) -> Made:
    """Returns the renderings of a request.

    Raises:
      LimitExceeded: the template exceeds a limit.
    """
    (made,) = render_all([request])
    if isinstance(made, LimitExceeded):
        raise made
    return made


def render_all(requests: Sequence[Request]) -> Iterator[Made | LimitExceeded]:
    """Yields the renderings of each request, in order.

    Many requests share a round trip. `LimitExceeded` takes the place of renderings that exceed a
    limit, and ends the iterator.
    """
    start = 0
    while start < len(requests):
        stop, size = start + 1, len(requests[start].body)
        while stop < len(requests) and (size := size + len(requests[stop].body)) < _MESSAGE_BYTES:
            stop += 1
        answered = _ask(requests[start:stop])
        for answers in answered:
            if isinstance(answers, LimitExceeded):
                yield answers
                return
            yield [_made(answer) for answer in answers]
        start += len(answered)


def _made(answer: Mapping[str, Any]) -> str | RenderingError:
    if "text" in answer:
        return answer["text"]
    return RenderingError(answer["error"], answer["type"], answer["line"])


@functools.lru_cache(maxsize=32)
def percent_literals(source: str) -> tuple[str, ...]:
    """Returns the string literals of a template that contain a percent sign.

    Raises:
      LimitExceeded: finding them exceeds a limit.
    """
    (answers,) = _ask([Request("", encode({"literals": source}), 1)])
    if isinstance(answers, LimitExceeded):
        raise answers
    return tuple(answers[0].get("literals", ()))


def _plain(value: Any) -> Any:
    """Returns what a template sees of an object that JSON lacks, as in `transformers`."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.generic):
        return value.item()
    return f"<{type(value).__name__}>"


def _ask(requests: Sequence[Request]) -> list[list[dict[str, Any]] | LimitExceeded]:
    """Returns the answers to each request of a message; starts the process if it does not run.

    There are fewer results than requests if one exceeds a limit, which is then the last result, or
    if the answers together are too long, and the other requests have to be sent in another message.
    """
    found: list[list[dict[str, Any]] | LimitExceeded] = []
    with _lock:
        process = _running()
        try:
            answers = process.answers(requests)
            for request in requests:
                own = list(itertools.islice(answers, request.count))
                if any("later" in answer for answer in own):
                    break
                if limit := next((a["limit"] for a in own if "limit" in a), None):
                    end()  # the process may keep what it has allocated
                    return [*found, LimitExceeded(_LIMITS[limit])]
                found.append(own)
        except TimeoutError:
            end()
            return [*found, LimitExceeded(f"takes more than {SECONDS:g} seconds")]
        except BrokenPipeError:
            code = process.end()
            end()
            if code == -signal.SIGKILL:  # the limits do not do that, but the kernel does
                raise Retry(
                    "the process that renders chat templates was killed: is the memory of the "
                    "machine exhausted?"
                ) from None
            return [*found, LimitExceeded(f"ends its process ({_exit_reason(code)})")]
        except LimitExceeded as error:
            end()
            return [*found, error]
        except BaseException:  # an interrupt: answers to these requests may still come
            end()
            raise
    return found


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
