"""Spans of the assistant's turns in a rendered conversation, found by comparing renderings.

The algorithm is independent of the markup of the template. Let R(n) be the rendering of the first n
turns and P(n) the same with a generation prompt. Turn n + 1 begins where P(n) ends, so its text is
R(n + 1) without the prefix P(n). If the whole conversation starts with R(n + 1), the span is known.
Otherwise the template changes earlier turns; many omit the think block of all turns but the last.
The end of the turn, as long as possible, is then located in the whole conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxtune.chats.messages import Message
from jaxtune.chats.reasoning import (
    empty_block_length,
    separate_reasoning,
    split_content,
    strip_think,
)
from jaxtune.chats.spelling import remove_whitespace

Span = tuple[int, int]
Render = Callable[[int, bool], str]
"""Renders the first n turns, with or without a generation prompt."""


class RewrittenTurn(Exception):
    """Raised if the template changes a turn, so that its targets cannot be determined."""


def turn_span(
    messages: Sequence[Message], index: int, render: Render, ends: tuple[str, ...]
) -> Span:
    """Returns the span of a turn in the rendering of all turns, in characters.

    A turn starts after the generation prompt of the preceding turns and ends with its end token,
    without the whitespace after that token.

    Args:
      messages: all turns.
      index: index of an assistant turn, above 0.
      render: ``(count, generation_prompt) -> text`` of the first turns.
      ends: texts of the tokens that may end a turn.

    Raises:
      RewrittenTurn: the turn does not start with its generation prompt, or lacks content.
    """
    text, prompt, turn = render(len(messages), False), render(index, True), render(index + 1, False)
    if not turn.startswith(prompt):
        raise RewrittenTurn("renders differently from its generation prompt")
    written = turn[len(prompt) :]
    if text.startswith(turn):
        start, stop = len(prompt), len(prompt) + _trimmed_length(written, ends)
    else:
        start, stop = _span_within(text, prompt, written, ends)
        if not _is_whole(messages[index], text[start:stop]):
            raise RewrittenTurn("renders differently when other turns follow")
    if not _is_whole(messages[index], text[start:stop]):
        # The generation prompt may contain the start of the content, such as <think>.
        before = render(index, False)
        if not (text.startswith(before) and _is_whole(messages[index], text[len(before) : stop])):
            raise RewrittenTurn("is not rendered completely")
    return start, stop


def skip_empty_block(text: str, span: Span, message: Message) -> Span:
    """Returns a span without the empty think block at its start, if the turn has no reasoning."""
    start, stop = span
    content = message.get("content") or ""
    if separate_reasoning(message).strip() or split_content(content, opened=False)[0]:
        return span
    return start + empty_block_length(text[start:stop]), stop


def _span_within(text: str, prompt: str, written: str, ends: tuple[str, ...]) -> Span:
    """Finds a turn in a text that omits the beginning of the turn, such as a think block.

    The text must continue after the generation prompt, with or without its think tag, with the
    longest possible end of the turn, up to and including its end token.
    """
    body = written[: _trimmed_length(written, ends)]
    end = min((end for end in ends if body.endswith(end)), key=len, default=None)
    for opening in (prompt, strip_think(prompt)):
        if end is None or not text.startswith(opening):
            continue
        # Only texts up to an end token are compared with the turn: comparing each possible end of
        # the turn instead would take quadratic time.
        start, stop = len(opening), len(opening) + len(body)
        while (last := text.rfind(end, start, stop)) >= 0:
            if body.endswith(text[start : last + len(end)]):
                return start, last + len(end)
            stop = last + len(end) - 1
    raise RewrittenTurn("renders differently when other turns follow")


def _trimmed_length(turn: str, ends: tuple[str, ...]) -> int:
    """Returns the length of a turn without the whitespace after its end token."""
    kept = turn.rstrip()
    return len(kept) if kept.endswith(ends) else len(turn)


def _is_whole(message: Message, written: str) -> bool:
    """Returns whether a rendering contains all content of a turn, up to whitespace."""
    parts = [separate_reasoning(message), message.get("content") or ""]
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        parts.append(call["function"]["name"])
        parts += [arguments] if isinstance(arguments, str) else arguments
    squeezed = remove_whitespace(written)
    return all(remove_whitespace(part) in squeezed for part in parts)
