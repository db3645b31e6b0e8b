"""What the assistant wrote in a rendered conversation, by comparing renderings of its turns.

Nothing here knows how a template marks a turn. A turn is what rendering adds when the turn is
added; the rendering of the whole conversation decides where that text stands, because a template
may leave a think block out of the turns before the last.
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
"""Renders the first turns, as many as it is told, with or without the prompt for the next."""


class RewrittenTurn(Exception):
    """The template changes a turn, so that its targets cannot be told; says how."""


def turn_span(
    messages: Sequence[Message], index: int, render: Render, ends: tuple[str, ...]
) -> Span:
    """Returns where a turn stands in the rendering of all turns, in characters.

    A turn starts where the generation prompt after the turns before it ends, and ends with its end
    token; white space after that token does not belong to it.

    Args:
      messages: all turns.
      index: of an assistant's turn, but not of the first turn.
      render: renders the first turns.
      ends: the tokens that may end a turn.

    Raises:
      RewrittenTurn: the turn renders otherwise than its generation prompt asks, or loses a part.
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
            raise RewrittenTurn("renders differently once other turns follow")
    if not _is_whole(messages[index], text[start:stop]):
        # The prompt may have opened what the content says itself, such as <think>.
        before = render(index, False)
        if not (text.startswith(before) and _is_whole(messages[index], text[len(before) : stop])):
            raise RewrittenTurn("is not rendered whole")
    return start, stop


def skip_empty_block(text: str, span: Span, message: Message) -> Span:
    """Returns a span without the empty think block that a turn without reasoning begins with."""
    start, stop = span
    content = message.get("content") or ""
    if separate_reasoning(message).strip() or split_content(content, opened=False)[0]:
        return span
    return start + empty_block_length(text[start:stop]), stop


def _span_within(text: str, prompt: str, written: str, ends: tuple[str, ...]) -> Span:
    """Finds a turn in a text whose rendering of it lacks what the turn alone begins with."""
    body = written[: _trimmed_length(written, ends)]
    if body.endswith(ends):
        for opening in (prompt, strip_think(prompt)):
            if not text.startswith(opening):
                continue
            for left_out in range(len(body)):
                if text.startswith(body[left_out:], len(opening)):
                    return len(opening), len(opening) + len(body) - left_out
    raise RewrittenTurn("renders differently once other turns follow")


def _trimmed_length(turn: str, ends: tuple[str, ...]) -> int:
    """Returns the length of a turn without the white space that follows its end token."""
    kept = turn.rstrip()
    return len(kept) if kept.endswith(ends) else len(turn)


def _is_whole(message: Message, written: str) -> bool:
    """Returns whether a rendering has all that a turn says, but for white space."""
    parts = [separate_reasoning(message), message.get("content") or ""]
    for call in message.get("tool_calls") or ():
        arguments = call["function"]["arguments"]
        parts.append(call["function"]["name"])
        parts += [arguments] if isinstance(arguments, str) else arguments
    squeezed = remove_whitespace(written)
    return all(remove_whitespace(part) in squeezed for part in parts)
