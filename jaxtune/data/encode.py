"""Rows become tokens and targets: a chunk of rows at a time, here or in a worker process."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxtune.chats.ends import span_ends
from jaxtune.chats.messages import read_arguments
from jaxtune.chats.template import ChatTemplate, read_template
from jaxtune.chats.tokens import IGNORE, Tokens, tokenize_batch
from jaxtune.config import DataConfig
from jaxtune.data.files import Record
from jaxtune.data.fitting import TOO_LONG, OverLong, fit
from jaxtune.data.formats import FORMATS, detect, unread_keys
from jaxtune.data.read import Row, parse
from jaxtune.data.samples import Reading, Sample
from jaxtune.errors import JaxtuneError
from jaxtune.vocabulary import ROOM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS, REASONING, BAD_ROWS = ("all", "last", "marked"), ("keep", "drop"), ("error", "skip")
EMPTY_REASONING = ("learn", "mask")
PROMPT = "{prompt}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of a config the tokens and targets of a data set depend on.

    Attributes:
      max_length: most tokens of an example.
      too_long: what becomes of a longer one: ``error``, ``drop``, ``truncate`` (its end),
        ``truncate_start`` or ``windows`` (several examples of at most so many tokens).
      chat_template: a Jinja file or the name of a built-in template, used in place of the
        tokenizer's own; empty: its own.
      chat_template_kwargs: arguments of the template, as JSON text; empty: none.
      vocab_size: token ids are below this; None: unchecked.
      format: the form of all rows; empty: that which their keys fit.
      targets: the turns that are learnt: ``all``, ``last`` or ``marked``.
      reasoning: ``keep`` or ``drop``.
      empty_reasoning: ``learn`` or ``mask``.
      prompt_templates: a file with a wording on each line, with ``{prompt}`` in it; empty: none.
      seed: of the choice among wordings.
      bad_rows: ``error`` or ``skip``.
      bad_rows_limit: most rows that may be skipped.
      clock: the time that a template prints; None: that of each rendering.
      template_text: Jinja source in place of ``chat_template``; empty: none.
    """

    max_length: int
    too_long: str = "error"
    chat_template: str = ""
    chat_template_kwargs: str = ""
    vocab_size: int | None = None
    format: str = ""
    targets: str = "all"
    reasoning: str = "keep"
    empty_reasoning: str = "learn"
    prompt_templates: str = ""
    seed: int = 0
    bad_rows: str = "error"
    bad_rows_limit: int = 100
    clock: datetime.datetime | None = None
    template_text: str = ""

    def __post_init__(self) -> None:
        """Refuses what none of the choices is."""
        for name, choices in (
            ("too_long", TOO_LONG),
            ("targets", TARGETS),
            ("reasoning", REASONING),
            ("empty_reasoning", EMPTY_REASONING),
            ("bad_rows", BAD_ROWS),
            ("format", ("", *FORMATS)),
        ):
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(filter(None, choices))
                raise JaxtuneError(f"data.{name} takes one of {known}, not {value!r}")

    def reading(self, tokenizer: PreTrainedTokenizerBase | None) -> Reading:
        """Returns how rows are read with a tokenizer."""
        template = None
        if tokenizer is not None:
            arguments = read_arguments(self.chat_template_kwargs, "data", "chat_template_kwargs")
            source = self.template_text or read_template(self.chat_template)
            template = ChatTemplate(tokenizer, source, arguments, self.clock)
        wordings = read_wordings(self.prompt_templates)
        how = (self.targets, self.reasoning, self.empty_reasoning)
        return Reading(template, *how, wordings, self.seed)


def read_wordings(path: str) -> tuple[str, ...]:
    """Reads the wordings that prompts are put into: one a line, with ``{prompt}`` in it.

    Raises:
      JaxtuneError: no such file, or a line without ``{prompt}``.
    """
    if not path:
        return ()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise JaxtuneError(f"data.prompt_templates={path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and PROMPT not in line:
            raise JaxtuneError(f"{path}:{number}: a wording needs {PROMPT} in it")
    wordings = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if not wordings:
        raise JaxtuneError(f"data.prompt_templates={path}: no wordings")
    return wordings


class Problem(NamedTuple):
    """A row that gives no example.

    Attributes:
      place: of the row.
      message: the whole line, which begins with the place.
      long: whether it is only too long, which ``data.too_long`` is for.
    """

    place: str
    message: str
    long: bool = False

    @classmethod
    def of(cls, record: Record, error: JaxtuneError) -> Problem:
        """Returns the problem of a record: one line, however long and wild what it quotes is."""
        message = " ".join(str(error).splitlines())
        return cls(record.place, message if len(message) < 1000 else f"{message[:1000]}…")

    @property
    def reason(self) -> str:
        """What is wrong, without the place."""
        return self.message.removeprefix(f"{self.place}: ")


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclasses.dataclass
class Chunk:
    """The examples of some rows.

    Attributes:
      read: how many rows the chunk has.
      tokens: int32[total] of all examples.
      targets: int32[total].
      lengths: int64[examples].
      contents: uint64[examples], a hash of what the row says.
      files: the beginning of each example's place.
      numbers: the number in each example's place.
      rows: the row of the chunk, from 0, that each example comes from.
      problems: rows that gave none.
      unread: keys that nothing reads.
      counts: of ``drop``, ``truncate`` (either end), ``windows`` and ``windowed`` (rows that gave
        windows).
      merged: places of rows in which a token joins the prompt's end and the answer's beginning.
      turns: how many turns were changed or left out, by what was done to them.
      ends: how many learned spans end in a token, by its id.
    """

    read: int
    tokens: np.ndarray = dataclasses.field(default_factory=_none)
    targets: np.ndarray = dataclasses.field(default_factory=_none)
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
    """A row's token ids and labels, int[n] each; ``merged`` as in `Tokens`; whether it was text."""

    ids: np.ndarray
    labels: np.ndarray
    merged: bool = False
    text: bool = False


class Encoder:
    """Tokenizes rows; holds what its worker process needs of the settings."""

    def __init__(self, settings: Settings, tokenizer: PreTrainedTokenizerBase | None):
        """Checks that the tokenizer, the template and the wordings can be used."""
        self.settings, self.tokenizer = settings, tokenizer
        self._reading = settings.reading(tokenizer)

    def form_of(self, record: Record) -> str:
        """Returns the form that a row has, or an empty string where it has none."""
        try:
            return detect(parse(record), self.settings.format)
        except JaxtuneError:
            return ""

    def __call__(self, records: Sequence[Record], form: str, first: str) -> Chunk:
        """Tokenizes some rows.

        Args:
          records: neighbours.
          form: that of their source; empty: unknown.
          first: the place of a row of that form.
        """
        chunk = Chunk(len(records))
        kept: list[tuple[int, Record, Sample]] = []
        for index, record in enumerate(records):
            try:
                row = parse(record)
                sample = self._sample(row, form, first)
                kept.append((index, record, sample))
                chunk.unread.update(unread_keys(row, form), sample.unread)
            except JaxtuneError as error:
                chunk.problems.append(Problem.of(record, error))
        tokens: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        samples = [sample for _, _, sample in kept]
        for (index, record, sample), encoded in zip(kept, self._tokenize(samples), strict=True):
            place = record.place
            try:
                self._check_ids(encoded, place)
                pieces = fit(encoded.ids, encoded.labels, self.settings, place, chunk.counts)
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
                chunk.ends.update(span_ends(encoded.labels))
            for piece_tokens, piece_targets in pieces:
                tokens.append(piece_tokens)
                targets.append(piece_targets)
                chunk.lengths.append(len(piece_tokens))
                chunk.contents.append(content)
                chunk.files.append(record.file)
                chunk.numbers.append(record.number)
                chunk.rows.append(index)
        chunk.tokens, chunk.targets = _joined(tokens), _joined(targets)
        return chunk

    def _sample(self, row: Row, form: str, first: str) -> Sample:
        found = detect(row, self.settings.format)
        if found != form:
            raise JaxtuneError(f"{row.place}: a row of {found} where {first} is of {form}")
        return FORMATS[form].read(row, self._reading)

    def _tokenize(self, samples: Sequence[Sample]) -> Iterator[_Encoded]:
        """Gives the tokens of each sample; those of one source are of one kind."""
        texts = [sample for sample in samples if sample.tokens is None]
        batches: dict[bool, Iterator[Tokens]] = {}
        for complete in (False, True):
            chosen = [sample for sample in texts if sample.ends is complete]
            if chosen:
                assert self.tokenizer is not None  # a reader of text has refused the row
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
                ids, learnt, merged = next(batches[sample.ends])
                yield _Encoded(ids, np.where(learnt, ids, np.int32(IGNORE)), merged, text=True)

    def _check_ids(self, encoded: _Encoded, place: str) -> None:
        limit = self.settings.vocab_size or 2**31
        labels = encoded.labels[encoded.labels != IGNORE]
        for name, ids in (("input_ids", encoded.ids), ("labels", labels)):
            outside = (ids < 0) | (ids >= limit)
            if not outside.any():
                continue
            wrong = ids[outside][0]
            advice = f"; {ROOM}" if wrong >= limit else ""
            if not encoded.text:
                raise JaxtuneError(
                    f"{place}: {name} holds {wrong}, and the vocabulary has ids 0 to {limit - 1}"
                    f"{advice}"
                )
            assert self.tokenizer is not None  # it has made the ids
            token = self.tokenizer.convert_ids_to_tokens(int(wrong))
            raise JaxtuneError(
                f'{place}: "{token}" is token {wrong} of the tokenizer, and the model has ids 0 to '
                f"{limit - 1} (vocab_size){advice}, or use the tokenizer that it was trained with"
            )


def _array(ids: Sequence[int]) -> np.ndarray:
    """Returns int64[n]; or object[n] where an id does not fit, for the check to name."""
    try:
        return np.array(ids, np.int64)
    except OverflowError:
        return np.array(ids, object)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else _none()


def settings_from(section: DataConfig, *, seed: int, vocab_size: int | None) -> Settings:
    """Returns the settings that the ``data`` section of a config makes."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    others = {"seed", "vocab_size", "clock", "template_text"}
    values = {name: getattr(section, name) for name in fields - others}
    return Settings(**values, seed=seed, vocab_size=vocab_size)
