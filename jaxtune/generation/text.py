"""Text of tokens that arrive in parts: whole characters only, and up to a stop string.

A token can hold a part of a character, or text that depends on its neighbours. `TextStream` returns
text only when later tokens cannot change it, so the pieces add up to the text of all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtune.errors import JaxtuneError, check_argument, shown
from jaxtune.generation.generate import Generation

_PARTIAL = "\ufffd"  # what tokenizers decode an incomplete character to
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a single byte in SentencePiece's vocabularies


class TextStream:
    """Decodes the tokens of one answer as they arrive."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        """Starts an empty text.

        Args:
          tokenizer: tokenizer of `transformers`.
          skip_special_tokens: leaves special tokens out of the text.
        """
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        added = tokenizer.added_tokens_decoder.items()
        self._special = {token for token, entry in added if entry.special}
        self._tokens: list[int] = []
        # Tokens before `_read` have been returned as text. Decoding begins at `_context`, because
        # some tokenizers remove the space of the first token that they decode.
        self._context = self._read = 0

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the text that is certain by now and was not returned before."""
        self._tokens += tokens
        for end in range(len(self._tokens), self._read, -1):
            if self._complete(end):
                return self._advance(end)
        return ""

    def finish(self) -> str:
        """Returns the remaining text of a complete answer."""
        return self._advance(len(self._tokens))

    def text(self) -> str:
        """Returns the text of all tokens so far."""
        return self._decode(self._tokens)

    def _complete(self, end: int) -> bool:
        """Returns whether the text of the tokens up to `end` cannot change any more."""
        token = self._tokens[end - 1]
        if self._skip and token in self._special:
            return False  # bytes before and after a token that is left out can be one character
        # Tokenizers decode consecutive byte tokens together: valid ones as characters, and if one
        # of them is invalid, none.
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return False
        return not self._decode(self._tokens[self._context : end]).endswith(_PARTIAL)

    def _advance(self, end: int) -> str:
        before = self._decode(self._tokens[self._context : self._read])
        after = self._decode(self._tokens[self._context : end])
        # Context that decodes to nothing would not keep the first space of what follows.
        if self._decode(self._tokens[self._read : end]):
            self._context = self._read
        self._read = end
        return after[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode(self._tokenizer, tokens, self._skip)


def decode(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool) -> str:
    """Returns the text of tokens, without the clean-up of spaces, which would change it."""
    return tokenizer.decode(
        tokens,
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )


class AnswerText:
    """The text of one answer as it grows, cut before the first stop string.

    Attributes:
      stop: strings that end the text.
      stopped: whether a stop string has been found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), skip_special_tokens: bool = True):
        """Starts an empty text.

        Args:
          tokenizer: tokenizer of `transformers`.
          stop: strings that end the text.
          skip_special_tokens: leaves special tokens out of the text.
        """
        self.stopped = False
        self._stream, self.stop = TextStream(tokenizer, skip_special_tokens), tuple(stop)
        self._held = ""  # text that may begin a stop string

    def push(self, tokens: Sequence[int]) -> str:
        """Adds tokens; returns the new text that is certain to precede any stop string."""
        return self._add(self._stream.push(tokens))

    def finish(self) -> str:
        """Returns the remaining text of a complete answer."""
        text = self._add(self._stream.finish()) + self._held
        self._held = ""
        return text

    def whole(self) -> str:
        """Returns the whole text of a complete answer."""
        return cut_at_stop(self._stream.text(), self.stop)

    def _add(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        cut = cut_at_stop(text, self.stop)
        self.stopped = cut != text
        # The longest end of the text that a stop string begins with.
        held = 0
        if not self.stopped:
            longest = min(len(text), max(map(len, self.stop), default=1) - 1)
            held = next(
                (n for n in range(longest, 0, -1) if _begins(text[-n:], self.stop)),
                0,
            )
        self._held = cut[len(cut) - held :]
        return cut[: len(cut) - held]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Returns the text before the stop string that is complete first, or all of it without one.

    Of several that are complete with the same character, the longest counts. The result is that of
    reading the text character by character.
    """
    ends = [(text.find(each) + len(each), -len(each)) for each in stop if each in text]
    if not ends:
        return text
    end, negative = min(ends)
    return text[: end + negative]


def _begins(end: str, stop: Sequence[str]) -> bool:
    return any(each.startswith(end) for each in stop)


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Returns one or several stop strings as a tuple; raises if one is empty or not a string."""
    check_argument("stop", stop, (str, Sequence), "a text that ends an answer, or a list of texts")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for each in strings:
        if not isinstance(each, str) or not each:
            raise JaxtuneError(f"stop={shown(each)} is not a text that can end an answer")
    return strings


def stop_tokens(tokenizer: Any, stop: Sequence[str]) -> list[int]:
    """Returns the ids of stop strings that are an added token, such as an end of turn.

    The text of an answer may lack special tokens, so these end an answer as tokens.
    """
    added = {entry.content: token for token, entry in tokenizer.added_tokens_decoder.items()}
    return [added[each] for each in stop if each in added]


def stream_texts(generation: Generation, texts: Sequence[AnswerText]) -> Iterator[tuple[int, str]]:
    """Yields the text of answers while they are generated, as (row, piece); no piece is empty.

    Args:
      generation: generation that has not begun; a row ends at its stop string.
      texts: a new text for each row.
    """
    open_rows = set(range(len(texts)))
    for chunk in generation:
        for row in sorted(open_rows):
            text = texts[row]
            piece = text.push(chunk[row].tokens)
            if text.stopped:
                generation.end(row)
            elif generation.finished[row]:
                piece += text.finish()
            if generation.finished[row]:
                open_rows.remove(row)
            if piece:
                yield row, piece


def complete_texts(generation: Generation, texts: Sequence[AnswerText]) -> list[str]:
    """Returns the text of each answer once all are complete; arguments as in `stream_texts`."""
    if any(text.stop for text in texts):
        for _ in stream_texts(generation, texts):
            pass
    else:
        for text, answer in zip(texts, generation.complete(), strict=True):
            text.push(answer.tokens)
    return [text.whole() for text in texts]
