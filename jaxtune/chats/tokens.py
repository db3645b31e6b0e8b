"""Text as token ids: the one place where special tokens are added, and where targets are found.

Labels are aligned with the tokens, as Hugging Face has them: ``labels[t]`` is ``tokens[t]`` where
that token is to be learnt and `IGNORE` elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


class Tokenized(NamedTuple):
    """An example's token ids and labels, both int[n]."""

    tokens: Sequence[int]
    labels: Sequence[int]


class Tokens(NamedTuple):
    """A text's tokens.

    Attributes:
      ids: int32[n].
      learnt: bool[n], which of them are learnt.
      merged: whether a token has characters on both sides of the beginning of a span, so that the
        prompt alone has other tokens than the prompt in front of its answer.
    """

    ids: np.ndarray
    learnt: np.ndarray
    merged: bool


def tokenize_batch(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    complete: bool,
) -> list[Tokens]:
    """Tokenizes each text once, as a whole; tokens with a character in a span are learnt.

    BOS and EOS are there once, whether the text has them, the tokenizer adds them, or both: a run
    of either counts as one token. An answer that brings the token that its template ends turns
    with is ended once. BOS is never learnt, unless the tokenizer uses it as EOS.

    Args:
      tokenizer: a fast tokenizer.
      texts: whole examples.
      spans: by text, ``(start, end)`` in characters, in order. A token over a span's edge counts
        as within: left out, an answer's first word would never be learnt after a prompt that ends
        in a space.
      complete: whether the tokenizer adds the tokens that it adds by itself, such as BOS, and EOS
        ends the text and is learnt; white space behind an EOS of the text is left out then.
        Otherwise the text has its own special tokens, as a chat template writes them.

    Returns:
      The tokens by text.
    """
    backend = _unlimited_backend(tokenizer)
    if complete:
        texts = [_strip_after_eos(text, tokenizer.eos_token) for text in texts]
    encodings = backend.encode_batch(list(texts), add_special_tokens=complete)
    single, found = _unrepeated_ids(tokenizer, backend), []
    added = {} if complete else tokenizer.added_tokens_decoder
    for text, encoding, marked in zip(texts, encodings, spans, strict=True):
        ranges = [_token_range(encoding, span) for span in marked]
        if end := _repeated_end(added, encoding.ids, ranges):
            text, marked = _remove_repeated_end(text, marked, end)
            encoding = backend.encode(text, add_special_tokens=False)
            ranges = [_token_range(encoding, span) for span in marked]
        ids = np.array(encoding.ids, np.int32)
        learnt, merged = np.zeros(len(ids), bool), False
        for (first, stop), (start, _) in zip(ranges, marked, strict=True):
            learnt[first:stop] = True
            merged |= stop > 0 and encoding.token_to_chars(first)[0] < start
        ids, learnt = _merge_repeats(ids, learnt, single)
        if complete:
            ids, learnt = _end_with_eos(ids, learnt, tokenizer.eos_token_id)
        if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
            learnt &= ids != tokenizer.bos_token_id
        found.append(Tokens(ids, learnt, merged))
    return found


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    complete: bool,
) -> Tokenized:
    """Tokenizes one text as `tokenize_batch` does.

    Returns:
      tokens and labels, int[n] each.
    """
    (tokens,) = tokenize_batch(tokenizer, [text], [spans], complete=complete)
    return Tokenized(tokens.ids.tolist(), np.where(tokens.learnt, tokens.ids, IGNORE).tolist())


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, *, complete: bool = True
) -> list[int]:
    """Returns the ids of a text that is to be continued, int[n]: how `tokenize_batch` begins it.

    Args:
      tokenizer: a fast tokenizer.
      text: a prompt.
      complete: whether the tokenizer adds what it puts in front of a text. What it puts behind
        one, such as EOS, is left out: it would end the text before it is continued.
    """
    backend = _unlimited_backend(tokenizer)
    encoding = backend.encode(text, add_special_tokens=complete)
    behind = 0
    if complete:
        mask = backend.encode("a").special_tokens_mask
        behind = mask[::-1].index(0) if 0 in mask else 0
    ids = np.array(encoding.ids[: len(encoding.ids) - behind], np.int32)
    ids, _ = _merge_repeats(ids, np.zeros(len(ids), bool), _unrepeated_ids(tokenizer, backend))
    return ids.tolist()


def _unlimited_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns what tokenizes, set to neither shorten nor pad."""
    backend: Any = tokenizer.backend_tokenizer
    # A tokenizer.json may ask for either, and silently shorten what is learnt.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def _unrepeated_ids(tokenizer: PreTrainedTokenizerBase, backend: Any) -> set[int]:
    """Returns the ids of which a run counts as one: BOS, EOS and what the tokenizer adds."""
    empty = backend.encode("")
    marks = zip(empty.ids, empty.special_tokens_mask, strict=True)
    by_itself = [token for token, mark in marks if mark]
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return {*by_itself, *(token for token in named if isinstance(token, int))}


def _strip_after_eos(text: str, end: object) -> str:
    """Returns a text without the white space that follows the EOS it ends in."""
    kept = text.rstrip()
    return kept if end and kept.endswith(str(end)) else text


def _repeated_end(
    added: Mapping[int, Any], ids: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> str:
    """Returns the added token that ends a range and is in it before, or an empty string."""
    for first, stop in ranges:
        end = ids[stop - 1] if stop else -1
        if end in added and end in ids[first : stop - 1]:
            return str(added[end])
    return ""


def _remove_repeated_end(
    text: str, spans: Sequence[tuple[int, int]], end: str
) -> tuple[str, list[tuple[int, int]]]:
    """Takes out an end token that is followed, but for white space, by that of its span."""
    pieces, moved, done, size = [], [], 0, 0
    for start, stop in spans:
        said = text[start:stop]
        while said.endswith(end):
            body = said.removesuffix(end)
            inner = body.rstrip()
            if not inner.endswith(end):
                break
            said = inner.removesuffix(end) + body[len(inner) :] + end
        size += start - done
        moved.append((size, size + len(said)))
        pieces += [text[done:start], said]
        size, done = size + len(said), stop
    return "".join(pieces) + text[done:], moved


def _merge_repeats(
    ids: np.ndarray, learnt: np.ndarray, single: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Makes one token of each run of a token in `single`, learnt if any of the run is."""
    same = ids[1:] == ids[:-1]
    if not same.any():
        return ids, learnt
    kept = np.concatenate([[True], ~(same & np.isin(ids[1:], list(single)))])
    return ids[kept], np.logical_or.reduceat(learnt, np.flatnonzero(kept))


def _end_with_eos(
    ids: np.ndarray, learnt: np.ndarray, end: object
) -> tuple[np.ndarray, np.ndarray]:
    """Puts EOS behind a text that has none, and makes it learnt."""
    assert isinstance(end, int)  # a reader of text has refused the row
    if not len(ids) or ids[-1] != end:
        ids, learnt = np.append(ids, np.int32(end)), np.append(learnt, True)
    learnt[-1] = True  # also where the tokenizer itself ends every text with EOS
    return ids, learnt


def _token_range(encoding: Any, span: tuple[int, int]) -> tuple[int, int]:
    """Returns the range of the tokens that have a character of a span."""
    start, end = span
    first = last = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1  # a character that belongs to no token
    while start < end and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    if first is None or last is None:
        return 0, 0
    # A character may take several tokens, such as the bytes of an emoji; this was its first.
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) is not None:
        if chars[0] >= end:
            break
        last += 1
    return first, last + 1
