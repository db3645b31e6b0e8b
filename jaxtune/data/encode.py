"""Encodes rows as tokens and targets, in chunks, in this process or in worker processes."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxtune.chats.ends import span_end_tokens
from jaxtune.chats.rendering import Steps, run_all
from jaxtune.chats.tokens import IGNORE, Tokens, tokenize_batch
from jaxtune.data.detect_format import FORMATS, detect_format, unread_keys
from jaxtune.data.file_formats import Record
from jaxtune.data.fitting import OverLong, fit_to_length, over_long
from jaxtune.data.rows import parse_row
from jaxtune.data.samples import Sample
from jaxtune.data.settings import DataSettings
from jaxtune.data.token_bound import TokenBound
from jaxtune.errors import JaxtuneError
from jaxtune.vocabulary import RESIZE_HINT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BYTES_PER_TOKEN = 32  # texts with fewer characters for each token of the limit are just tokenized


class Problem(NamedTuple):
    """A rejected row.

    Attributes:
      place: location of the row.
      message: error message, which begins with the location.
      long: whether the row is valid but too long (see ``data.too_long``).
    """

    place: str
    message: str
    long: bool = False

    @classmethod
    def of(cls, record: Record, error: JaxtuneError) -> Problem:
        """Returns the problem of a record, with a message of one line and bounded length."""
        message = " ".join(str(error).splitlines())
        return cls(record.place, message if len(message) < 1000 else f"{message[:1000]}…")

    @property
    def reason(self) -> str:
        """The message without the location."""
        return self.message.removeprefix(f"{self.place}: ")


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass
class Chunk:
    """The examples of consecutive rows.

    Attributes:
      read: number of rows.
      tokens: int32[total], tokens of all examples.
      targets: int32[total].
      lengths: int64[examples].
      contents: uint64[examples], content hash of each example's row.
      files: file part of each example's location.
      numbers: line or row number of each example's location.
      rows: index of each example's row in the chunk.
      problems: rejected rows.
      unread: unused keys.
      counts: number of ``drop``, ``truncate`` (either end), ``windows`` and ``windowed`` (rows that
        are split into windows).
      merged: locations of rows in which a token spans the boundary of prompt and answer.
      turns: number of turns that were changed or not trained on, by kind of change.
      ends: number of learned spans that end in a token, by token id.
    """

    read: int
    tokens: np.ndarray = dataclasses.field(default_factory=_no_tokens)
    targets: np.ndarray = dataclasses.field(default_factory=_no_tokens)
    lengths: list[int] = dataclasses.field(default_factory=list)
    contents: list[int] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    numbers: list[int] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    unread: set[str] = dataclasses.field(default_factory=set)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    merged: list[str] = dataclasses.field(default_factory=list)
    turns: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ends: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)


class _Encoded(NamedTuple):
    """The tokens of a row.

    Attributes:
      ids: int[n], token ids.
      labels: int[n], the same ids where a token is trained on, otherwise `IGNORE`.
      merged: whether a token spans the boundary of prompt and answer; see `Tokens`.
      text: whether the row was text, rather than input_ids and labels.
    """

    ids: np.ndarray
    labels: np.ndarray
    merged: bool = False
    text: bool = False


class Encoder:
    """Tokenizes chunks of rows; picklable, for worker processes."""

    def __init__(self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase | None):
        """Reads the templates; raises if they or the tokenizer cannot be used."""
        self.settings, self.tokenizer = settings, tokenizer
        self._reading = settings.reading(tokenizer)

    def detect_format(self, record: Record) -> str:
        """Returns the format of a row, or an empty string if it matches none."""
        try:
            return detect_format(parse_row(record), self.settings.format)
        except JaxtuneError:
            return ""

    def __call__(self, records: Sequence[Record], form: str, first: str) -> Chunk:
        """Tokenizes consecutive rows; a bad row becomes a `Problem` of the chunk.

        Args:
          records: rows of one source.
          form: format of the source; empty: unknown.
          first: location of the first row of that format, for errors.
        """
        chunk = Chunk(len(records))
        kept: list[tuple[int, Record, Sample]] = []
        read = run_all([self._sample(record, form, first) for record in records])
        for index, (record, found) in enumerate(zip(records, read, strict=True)):
            try:
                if isinstance(found, JaxtuneError):
                    raise found
                sample, unread = found
                if self._is_dropped(sample, record.place):
                    chunk.counts["drop"] += 1
                    chunk.turns.update(sample.turns)
                else:
                    kept.append((index, record, sample))
                chunk.unread.update(unread, sample.unread)
            except OverLong as error:
                chunk.problems.append(Problem.of(record, error)._replace(long=True))
            except JaxtuneError as error:
                chunk.problems.append(Problem.of(record, error))
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        samples = [sample for _, _, sample in kept]
        for (index, record, sample), encoded in zip(kept, self._tokenize(samples), strict=True):
            place = record.place
            try:
                self._check_ids(encoded, place)
                pieces = fit_to_length(
                    encoded.ids, encoded.labels, self.settings, place, chunk.counts
                )
            except OverLong as error:
                chunk.problems.append(Problem.of(record, error)._replace(long=True))
                continue
            except JaxtuneError as error:
                chunk.problems.append(Problem.of(record, error))
                continue
            chunk.turns.update(sample.turns)
            content = int.from_bytes(
                hashlib.blake2b(sample.content, digest_size=8).digest(), "little"
            )
            if encoded.merged and pieces:
                chunk.merged.append(place)
            if pieces:
                chunk.ends.update(span_end_tokens(encoded.labels))
            for piece_tokens, piece_targets in pieces:
                tokens.append(piece_tokens)
                targets.append(piece_targets)
                chunk.lengths.append(len(piece_tokens))
                chunk.contents.append(content)
                chunk.files.append(record.file)
                chunk.numbers.append(record.number)
                chunk.rows.append(index)
        chunk.tokens, chunk.targets = _concatenate(tokens), _concatenate(targets)
        return chunk

    def _sample(self, record: Record, form: str, first: str) -> Steps[tuple[Sample, Iterable[str]]]:
        """Returns the sample of a row, and the keys that its format does not use."""
        row = parse_row(record)
        found = detect_format(row, self.settings.format)
        if found != form:
            raise JaxtuneError(f"{row.place}: format {found}, but {first} has format {form}")
        sample = FORMATS[form].read(row, self._reading)
        if not isinstance(sample, Sample):
            sample = yield from sample
        return sample, unread_keys(row, form)

    @functools.cached_property
    def _bound(self) -> TokenBound:
        assert self.tokenizer is not None  # reading text has checked it
        return TokenBound(self.tokenizer)

    def _is_dropped(self, sample: Sample, place: str) -> bool:
        """Returns whether a text is too long by its bytes and ``too_long`` is ``drop``.

        Raises:
          OverLong: it is too long by its bytes, and ``too_long`` is ``error``.
        """
        limit, too_long = self.settings.max_length, self.settings.too_long
        # Shorter texts are tokenized in no time.
        certain = len(sample.text) > _BYTES_PER_TOKEN * limit and too_long in ("error", "drop")
        if sample.tokens is not None or not certain:
            return False
        tokens = self._bound.fewest_tokens(sample.text, sample.spans, sample.ends)
        if tokens <= limit:
            return False
        if too_long == "error":
            raise over_long(place, f"{len(sample.text):,} characters, at least {tokens}", limit)
        return True

    def _tokenize(self, samples: Sequence[Sample]) -> Iterator[_Encoded]:
        """Yields the tokens of each sample, in order.

        Texts are tokenized in two batches, with and without the tokenizer's special tokens, and the
        results are interleaved in the order of the samples.
        """
        texts = [sample for sample in samples if sample.tokens is None]
        batches: dict[bool, Iterator[Tokens]] = {}
        for complete in (False, True):
            chosen = [sample for sample in texts if sample.ends is complete]
            if chosen:
                assert self.tokenizer is not None  # reading text has checked it
                encoded = tokenize_batch(
                    self.tokenizer,
                    [sample.text for sample in chosen],
                    [sample.spans for sample in chosen],
                    complete=complete,
                )
                batches[complete] = iter(encoded)
        for sample in samples:
            if sample.tokens is not None:
                yield _Encoded(_array(sample.tokens.tokens), _array(sample.tokens.labels))
            else:
                ids, learned, merged = next(batches[sample.ends])
                yield _Encoded(ids, np.where(learned, ids, np.int32(IGNORE)), merged, text=True)

    def _check_ids(self, encoded: _Encoded, place: str) -> None:
        """Raises if a token id or label is outside the vocabulary."""
        limit = self.settings.vocab_size or 2**31
        labels = encoded.labels[encoded.labels != IGNORE]
        for name, ids in (("input_ids", encoded.ids), ("labels", labels)):
            outside = (ids < 0) | (ids >= limit)
            if not outside.any():
                continue
            wrong = ids[outside][0]
            advice = f"; {RESIZE_HINT}" if wrong >= limit else ""
            if not encoded.text:
                raise JaxtuneError(
                    f"{place}: {name} contains {wrong}, which is outside the vocabulary (ids 0 to "
                    f"{limit - 1}){advice}"
                )
            assert self.tokenizer is not None  # which made the ids
            token = self.tokenizer.convert_ids_to_tokens(int(wrong))
            raise JaxtuneError(
                f'{place}: the tokenizer encodes "{token}" as {wrong}, which is outside the '
                f"model's vocabulary (ids 0 to {limit - 1}){advice}, or use the tokenizer of the "
                "model"
            )


def _array(ids: Sequence[int]) -> np.ndarray:
    """Returns int64[n]; object[n] if an id exceeds 64 bits, for `_check_ids` to report."""
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        return np.array(ids, object)


def _concatenate(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else _no_tokens()
