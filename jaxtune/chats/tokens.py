"""Tokenization: the only module that adds special tokens and maps spans to targets.

Labels are aligned with tokens, as in Hugging Face: ``labels[t]`` is ``tokens[t]`` if that token is
a target and `IGNORE` otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100


class Tokenized(NamedTuple):
    """Token ids and labels of an example, int[n] each."""

    tokens: Sequence[int]
    labels: Sequence[int]


class Tokens(NamedTuple):
    """The tokens of a text.

    Attributes:
      ids: int32[n].
      learned: bool[n], whether a token is a target.
      merged: whether a token extends across the start of a span, so that the prompt alone is
        tokenized differently from the prompt followed by its answer.
    """

    ids: np.ndarray
    learned: np.ndarray
    merged: bool


def tokenize_batch(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[tuple[int, int]]],
    *,
    complete: bool,
) -> list[Tokens]:
    """Tokenizes each text as a whole; tokens that overlap a span are targets.

    Spans in characters are mapped to ranges of tokens by the offsets of the encoding. Consecutive
    copies of BOS or EOS are merged, because a text may contain one that the tokenizer adds as well;
    so is an end token that both an answer and its template write. BOS is not a target, unless it is
    also EOS.

    Args:
      tokenizer: a fast tokenizer.
      texts: complete examples.
      spans: ``(start, end)`` of the spans of each text, in characters, in order. A token that
        overlaps a span partly is included; otherwise the first word of an answer would not be
        trained on after a prompt that ends in a space.
      complete: whether the tokenizer adds its special tokens, such as BOS, and the text ends with
        EOS as a target, which replaces whitespace after an EOS in the text. Otherwise the text has
        its own special tokens, written by a chat template.

    Returns:
      The tokens of each text.
    """
    backend = _unlimited_backend(tokenizer)
    if complete:
        texts = [_strip_after_eos(text, tokenizer.eos_token) for text in texts]
    encodings = backend.encode_batch(list(texts), add_special_tokens=complete)
    single, found = unrepeated_ids(tokenizer, backend), []
    added = {} if complete else tokenizer.added_tokens_decoder
    for text, encoding, marked in zip(texts, encodings, spans, strict=True):
        ranges = [_token_range(encoding, span) for span in marked]
        if end := _repeated_end(added, encoding.ids, ranges):
            text, marked = _remove_repeated_end(text, marked, end)
            (encoding,) = backend.encode_batch([text], add_special_tokens=False)
            ranges = [_token_range(encoding, span) for span in marked]
        ids = np.array(encoding.ids, np.int32)
        learned, merged = np.zeros(len(ids), bool), False
        for (first, stop), (start, _) in zip(ranges, marked, strict=True):
            learned[first:stop] = True
            merged |= stop > 0 and encoding.token_to_chars(first)[0] < start
        ids, learned = _merge_repeats(ids, learned, single)
        if complete:
            ids, learned = _end_with_eos(ids, learned, tokenizer.eos_token_id)
        if tokenizer.bos_token_id not in (None, tokenizer.eos_token_id):
            learned &= ids != tokenizer.bos_token_id
        found.append(Tokens(ids, learned, merged))
    return found


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    spans: Sequence[tuple[int, int]],
    *,
    complete: bool,
) -> Tokenized:
    """Tokenizes one text; see `tokenize_batch`."""
    (tokens,) = tokenize_batch(tokenizer, [text], [spans], complete=complete)
    return Tokenized(tokens.ids.tolist(), np.where(tokens.learned, tokens.ids, IGNORE).tolist())


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, *, complete: bool = True
) -> list[int]:
    """Returns the token ids of a prompt, int[n], consistent with `tokenize_batch`.

    Args:
      tokenizer: a fast tokenizer.
      text: a prompt.
      complete: whether the tokenizer adds its special tokens at the start. Those that it adds at
        the end, such as EOS, are removed, because the model is to continue the text.
    """
    backend = _unlimited_backend(tokenizer)
    # Not `encode`, which would hold the GIL, so that a signal could not end the process.
    (encoding,) = backend.encode_batch([text], add_special_tokens=complete)
    behind = 0
    if complete:
        mask = backend.encode("a").special_tokens_mask
        behind = mask[::-1].index(0) if 0 in mask else 0
    ids = np.array(encoding.ids[: len(encoding.ids) - behind], np.int32)
    ids, _ = _merge_repeats(ids, np.zeros(len(ids), bool), unrepeated_ids(tokenizer, backend))
    return ids.tolist()


def _unlimited_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns the backend tokenizer, with truncation and padding disabled."""
    backend: Any = tokenizer.backend_tokenizer
    # A tokenizer.json may enable both; truncation would silently drop targets.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    return backend


def unrepeated_ids(tokenizer: PreTrainedTokenizerBase, backend: Any) -> set[int]:
    """Returns the ids whose consecutive copies are merged: BOS, EOS and any the tokenizer adds."""
    empty = backend.encode("")
    marks = zip(empty.ids, empty.special_tokens_mask, strict=True)
    by_itself = [token for token, mark in marks if mark]
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return {*by_itself, *(token for token in named if isinstance(token, int))}


def _strip_after_eos(text: str, end: object) -> str:
    """Returns a text without the whitespace that follows an EOS at its end."""
    kept = text.rstrip()
    return kept if end and kept.endswith(str(end)) else text


def _repeated_end(
    added: Mapping[int, Any], ids: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> str:
    """Returns the added token that ends a range and also occurs earlier in it, or ``""``."""
    for first, stop in ranges:
        end = ids[stop - 1] if stop else -1
        if end in added and end in ids[first : stop - 1]:
            return str(added[end])
    return ""


def _remove_repeated_end(
    text: str, spans: Sequence[tuple[int, int]], end: str
) -> tuple[str, list[tuple[int, int]]]:
    """Removes an end token that is followed, apart from whitespace, by the end token of its span.

    Returns:
      The text, and the spans moved to their new positions.
    """
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
    ids: np.ndarray, learned: np.ndarray, single: set[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Merges consecutive copies of the ids in `single`.

    A copy is dropped if the token before it is the same. The merged token is a target if any of the
    copies is: `reduceat` takes the disjunction of each kept token and the copies dropped after it.

    Args:
      ids: int32[n].
      learned: bool[n].
      single: ids to merge.

    Returns:
      ids int32[m] and learned bool[m], m ≤ n.
    """
    same = ids[1:] == ids[:-1]
    if not same.any():
        return ids, learned
    kept = np.concatenate([[True], ~(same & np.isin(ids[1:], list(single)))])
    return ids[kept], np.logical_or.reduceat(learned, np.flatnonzero(kept))


def _end_with_eos(
    ids: np.ndarray, learned: np.ndarray, end: object
) -> tuple[np.ndarray, np.ndarray]:
    """Appends EOS to a text that does not end with it, and makes it a target."""
    assert isinstance(end, int)  # reading text has checked it
    if not len(ids) or ids[-1] != end:
        ids, learned = np.append(ids, np.int32(end)), np.append(learned, True)
    learned[-1] = True  # also if the tokenizer has added EOS itself
    return ids, learned


def _token_range(encoding: Any, span: tuple[int, int]) -> tuple[int, int]:
    """Returns ``(first, stop)``, the range of the tokens that overlap a span; (0, 0) if none do."""
    start, end = span
    first = last = None
    while start < end and (first := encoding.char_to_token(start)) is None:
        start += 1  # the character is not part of any token
    while start < end and (last := encoding.char_to_token(end - 1)) is None:
        end -= 1
    if first is None or last is None:
        return 0, 0
    # A character may have several tokens, such as the bytes of an emoji; `last` is the first one.
    while last + 1 < len(encoding) and (chars := encoding.token_to_chars(last + 1)) is not None:
        if chars[0] >= end:
            break
        last += 1
    return first, last + 1
