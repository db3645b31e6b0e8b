"""Program of the process that renders chat templates; `template_process` starts it.

Templates are untrusted. The sandbox of `transformers` restricts what they can reach, and this
process restricts how much memory and time they can use. It runs as a file of its own, so that it
imports `transformers` and nothing of jaxtune or JAX.

Messages in both directions are JSON documents in UTF-8, preceded by their length. The first one has
the import path and the limits, and is answered when the process is ready. Any other one is a list
of requests, each with its template. It is read completely before the first answer, and its sender
reads all answers before the next one, so the two never wait for each other to empty a pipe.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

HEADER_BYTES = 8
_ERROR_CHARACTERS = 2000
_HELD_SECONDS = 0.1  # answers to a request are sent together unless they take longer


def encode(value: Any, default: Any = None) -> bytes:
    """Returns a value as JSON.

    Args:
      value: JSON values; floats may be infinite or NaN.
      default: function that returns a JSON value for any other object.
    """
    text = json.dumps(value, ensure_ascii=False, default=default)
    return text.encode("utf-8", "surrogatepass")


def message(content: bytes) -> bytes:
    """Returns JSON with its length."""
    return len(content).to_bytes(HEADER_BYTES, "little") + content


def decode(content: bytes) -> Any:
    """Returns the value of a message without its length."""
    return json.loads(content.decode("utf-8", "surrogatepass"))


def main() -> None:
    """Answers messages until the input ends."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # the end of the input ends the process
    answers = os.fdopen(os.dup(1), "wb", 2**18)
    os.dup2(2, 1)  # nothing else may write to the pipe
    sources: dict[int, str] = {}
    with answers:
        limits = _read(sys.stdin.buffer)
        sys.path[:] = limits["path"]
        try:
            import transformers  # noqa: F401
            from transformers import PreTrainedTokenizerBase  # noqa: F401

            _probe()
        except Exception as error:
            answers.write(message(encode(_error(error))))
            answers.flush()
            return
        gc.freeze()  # not searched for garbage after each batch of renderings
        _limit_memory(limits["memory"])
        answers.write(message(encode({"ready": True})))
        answers.flush()
        while (requests := _read(sys.stdin.buffer)) is not None:
            _answer_all(requests, sources, limits, answers)


def _probe() -> None:
    """Raises if this version of transformers does not render with a `_Tokenizer`."""
    request = {"turns": [{"role": "user", "content": "x"}], "tools": None, "arguments": {}}
    if _render(request, "{{ messages[0]['content'] }}", 1, False) != {"text": "x"}:
        raise RuntimeError("this version of transformers renders templates differently")


def _read(file: BinaryIO) -> Any:
    """Returns the next message, or None at the end of the input."""
    header = file.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    return decode(file.read(int.from_bytes(header, "little")))


def _limit_memory(more: int) -> None:
    """Limits the address space to its present size and `more` bytes, and forbids writing files."""
    with contextlib.suppress(OSError, ValueError):  # not on every system
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft = pages * resource.getpagesize() + more
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, soft))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))


def _limit_time(more: float) -> None:
    """Lets the system end the process after `more` seconds of CPU time.

    The parent ends it earlier; this is for a process whose parent was killed.
    """
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + more)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _answer_all(
    requests: list[Any], sources: dict[int, str], limits: dict[str, Any], answers: BinaryIO
) -> None:
    """Writes an answer for each part of each request.

    The last one is ``later`` if the texts are too long to be kept together. The answers to a
    request are written before the next one starts, so that a missing one shows which was at fault.

    Args:
      requests: pairs of a template, as its key and, if it is new, its source, and a request.
      sources: known templates by key; new ones are added.
      limits: limits by name.
      answers: file to write to.
    """
    characters, sent = 0, time.monotonic()
    for template, request in requests:
        if characters > limits["characters"]:
            answers.write(message(encode({"later": True})))
            answers.flush()
            return
        if "source" in template:
            sources[template["key"]] = template["source"]
        for answer in _answers(request, sources.get(template.get("key"), ""), limits):
            characters += len(answer.get("text", ""))
            answers.write(message(encode(answer)))
            if time.monotonic() > sent + _HELD_SECONDS:
                answers.flush()
                sent = time.monotonic()
        answers.flush()


def _answers(
    request: dict[str, Any], source: str, limits: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields an answer for each part of a request."""
    if "literals" in request:
        parts = [lambda: {"literals": _literals(request["literals"])}]
    else:
        parts = [
            lambda count=count, prompt=prompt: _render(request, source, count, prompt)
            for count, prompt in request["wanted"]
        ]
    for part in parts:
        _limit_time(2 * limits["seconds"])
        try:
            answer = part()
        except MemoryError:
            answer = {"limit": "memory"}
        # The expressions of a template can raise anything.
        except Exception as error:
            answer = _error(error)
        if len(answer.get("text", "")) > limits["characters"]:
            answer = {"limit": "characters"}
        yield answer


class _Tokenizer:
    """What `apply_chat_template` reads of a tokenizer; special tokens are arguments instead."""

    special_tokens_map: ClassVar[dict[str, str]] = {}

    def get_chat_template(self, chat_template: str, tools: Any = None) -> str:
        del tools
        return chat_template


def _render(request: dict[str, Any], source: str, count: int, prompt: bool) -> dict[str, Any]:
    """Returns the text of the first `count` turns, with or without a generation prompt."""
    from transformers import PreTrainedTokenizerBase

    apply: Any = PreTrainedTokenizerBase.apply_chat_template
    text = apply(
        _Tokenizer(),
        request["turns"][:count],
        chat_template=source,
        tokenize=False,
        add_generation_prompt=prompt,
        tools=request["tools"],
        **request["arguments"],
    )
    return {"text": text}


def _literals(source: str) -> list[str]:
    """Returns the string literals of a template that contain a percent sign."""
    import jinja2

    found = []
    # Syntax errors are reported when the template is rendered.
    with contextlib.suppress(jinja2.TemplateSyntaxError, UnicodeDecodeError):
        for _, kind, text in jinja2.Environment().lex(source):
            if kind == "string" and "%" in text:
                escaped = text[1:-1].encode("ascii", "backslashreplace")  # as Jinja decodes them
                found.append(escaped.decode("unicode-escape"))
    return found


def _error(error: Exception) -> dict[str, Any]:
    text = str(getattr(error, "message", None) or error)[:_ERROR_CHARACTERS]
    return {"error": text, "type": type(error).__name__, "line": getattr(error, "lineno", None)}


if __name__ == "__main__":
    main()
