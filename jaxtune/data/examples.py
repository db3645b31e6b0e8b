"""Training examples: token ids and targets, memory-mapped from files or in memory."""

from __future__ import annotations

import abc
import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from jaxtune.chats.tokens import IGNORE
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import read_object

TOKENS, TARGETS, INDEX, META = "tokens.int32", "targets.int32", "index.npz", "meta.json"


class SourceSlice(NamedTuple):
    """The examples of one source, which are consecutive.

    Attributes:
      name: name of the source.
      form: format of its rows.
      count: number of examples.
      weight: average number of times that an epoch shows each example.
    """

    name: str
    form: str
    count: int
    weight: float = 1.0


class _LazySequence(Sequence[Any], abc.ABC):
    """A sequence that creates its items on access."""

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._item(index % len(self))

    @abc.abstractmethod
    def _item(self, index: int) -> Any: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


class Ragged(_LazySequence):
    """A sequence of arrays of different lengths, int32[n], which are views of a flat array."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        """Initializes from a flat array int32[total] and offsets int64[items + 1]."""
        self.flat, self.offsets = flat, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _item(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


class Places(_LazySequence):
    """Locations of examples, ``"train.jsonl:17"``, stored as indices of files and row numbers."""

    def __init__(self, files: Sequence[str], file_ids: np.ndarray, numbers: np.ndarray):
        """Initializes from file parts, indices into them, int32[n], and row numbers, int64[n]."""
        self._files, self._ids, self._numbers = files, file_ids, numbers

    def __len__(self) -> int:
        return len(self._ids)

    def _item(self, index: int) -> str:
        return f"{self._files[self._ids[index]]}{self._numbers[index]}"


class Selected(_LazySequence):
    """A view of a sequence at indices int64[n]."""

    def __init__(self, base: Sequence[Any], indices: np.ndarray):
        """Initializes from a sequence and indices into it."""
        self._base, self._indices = base, indices

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> Any:
        return self._base[int(self._indices[index])]


@dataclasses.dataclass(frozen=True)
class Examples:
    """A data set, in the order of its files.

    Attributes:
      tokens: int32[n] per example; n differs between examples.
      targets: int32[n] per example: ``targets[t]`` is the token to predict after ``tokens[t]``, or
        `IGNORE`.
      places: location of each example, ``"train.jsonl:17"``.
      dropped: number of rows dropped because they are too long.
      truncated: number of rows truncated because they are too long.
      unread: keys of rows that are not used by their format.
      windows: number of examples that are windows of a longer row.
      rejected: number of bad rows by reason.
      parts: the examples by source, in order; empty: a single source of weight 1.
      contents: uint64[examples], content hash of each example's row; None: unknown.
      special: ids of special tokens.
      rows_read: number of rows read, including dropped and rejected ones.
      windowed: number of rows split into windows.
      merged: number of rows in which a token spans the boundary of prompt and answer.
      merged_place: location of the first of these rows.
      rows: int64[examples], index of each example's row among all rows read. None: every example
        is a row.
      turns: number of turns that were changed or not trained on, by kind of change.
      ends: number of learned spans that end in a token, by token id, before rows are truncated.
    """

    tokens: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    places: Sequence[str]
    dropped: int = 0
    truncated: int = 0
    unread: tuple[str, ...] = ()
    windows: int = 0
    rejected: Mapping[str, int] = dataclasses.field(default_factory=dict)
    parts: tuple[SourceSlice, ...] = ()
    contents: np.ndarray | None = None
    special: tuple[int, ...] = ()
    rows_read: int = 0
    windowed: int = 0
    merged: int = 0
    merged_place: str = ""
    rows: np.ndarray | None = None
    turns: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ends: Mapping[int, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, int64[examples]."""
        if isinstance(self.tokens, Ragged):
            return np.diff(self.tokens.offsets)
        return np.fromiter(map(len, self.tokens), np.int64, len(self.tokens))

    @property
    def token_count(self) -> int:
        """Number of tokens of all examples."""
        return int(self.lengths.sum())

    @functools.cached_property
    def target_count(self) -> int:
        """Number of targets of all examples."""
        chunks = [self.targets.flat] if isinstance(self.targets, Ragged) else self.targets
        return sum(int(np.count_nonzero(targets != IGNORE)) for targets in chunks)

    @functools.cached_property
    def row_of_example(self) -> np.ndarray:
        """Row index of each example, int64[examples]; windows of a row have the same one."""
        return np.arange(len(self)) if self.rows is None else self.rows

    @functools.cached_property
    def row_count(self) -> int:
        """Number of distinct rows of the examples."""
        return len(np.unique(self.row_of_example))

    @property
    def duplicates(self) -> int:
        """Number of rows with the same content as an earlier row."""
        if self.contents is None:
            return 0
        return self.row_count - len(np.unique(self.contents))

    def fingerprint(self) -> str:
        """Returns the hexadecimal SHA-256 of all tokens and targets in order."""
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for tokens, targets in zip(self.tokens, self.targets, strict=True):
            # With the length, two short examples hash differently from one long one.
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(tokens, "<i4").tobytes())
            digest.update(np.ascontiguousarray(targets, "<i4").tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """Returns a view of the examples at ascending indices int64[n], without copying them."""
        chosen = np.asarray(indices, np.int64)
        parts, start = [], 0
        for part in self.parts:
            inside = np.searchsorted(chosen, [start, start + part.count])
            parts.append(part._replace(count=int(inside[1] - inside[0])))
            start += part.count
        return dataclasses.replace(
            self,
            tokens=Selected(self.tokens, chosen),
            targets=Selected(self.targets, chosen),
            places=Selected(self.places, chosen),
            parts=tuple(part for part in parts if part.count),
            contents=None if self.contents is None else self.contents[chosen],
            rows=self.row_of_example[chosen],
        )


def join(sets: Sequence[Examples]) -> Examples:
    """Concatenates one or more sets of examples."""
    if len(sets) == 1:
        return sets[0]
    contents = [each.contents for each in sets if each.contents is not None]
    rows, start = [], 0
    for each in sets:
        rows.append(each.row_of_example + start)
        start += int(each.row_of_example.max(initial=-1)) + 1
    return Examples(
        tokens=[tokens for each in sets for tokens in each.tokens],
        targets=[targets for each in sets for targets in each.targets],
        places=[place for each in sets for place in each.places],
        dropped=sum(each.dropped for each in sets),
        truncated=sum(each.truncated for each in sets),
        unread=tuple(sorted({key for each in sets for key in each.unread})),
        windows=sum(each.windows for each in sets),
        rejected=_sum_counts(each.rejected for each in sets),
        parts=tuple(part for each in sets for part in each.parts),
        contents=np.concatenate(contents) if len(contents) == len(sets) else None,
        special=sets[0].special,
        rows_read=sum(each.rows_read for each in sets),
        windowed=sum(each.windowed for each in sets),
        merged=sum(each.merged for each in sets),
        merged_place=next((each.merged_place for each in sets if each.merged), ""),
        rows=np.concatenate(rows),
        turns=_sum_counts(each.turns for each in sets),
        ends=sum((collections.Counter(each.ends) for each in sets), collections.Counter()),
    )


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sum(map(collections.Counter, counts), collections.Counter()))


class ExamplesWriter:
    """Writes examples to a directory, chunk by chunk, for `open_examples`.

    Tokens and targets of all examples are concatenated in two flat int32 files. The index, a .npz
    file, has an array [examples] for each column; offsets follow from ``lengths``.
    """

    def __init__(self, directory: Path):
        """Creates the files."""
        self._directory = directory
        self._tokens = (directory / TOKENS).open("wb")
        self._targets = (directory / TARGETS).open("wb")
        self._columns: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def add(self, tokens: np.ndarray, targets: np.ndarray, **columns: np.ndarray) -> None:
        """Appends examples.

        Args:
          tokens: int32[total], tokens of all examples.
          targets: int32[total].
          columns: arrays [examples] named ``lengths``, ``contents``, ``file_ids``, ``numbers`` and
            ``rows``.

        Raises:
          JaxtuneError: the disk is full.
        """
        try:
            self._tokens.write(tokens.astype("<i4", copy=False).tobytes())
            self._targets.write(targets.astype("<i4", copy=False).tobytes())
        except OSError as error:
            raise JaxtuneError(f"{self._directory}: {error.strerror}") from error
        for name, column in columns.items():
            self._columns[name].append(column)

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Closes the files, and writes the index and `meta`, JSON-serializable values."""
        self._tokens.close()
        self._targets.close()
        whole = {name: np.concatenate(columns) for name, columns in self._columns.items()}
        with (self._directory / INDEX).open("wb") as file:
            np.savez(file, allow_pickle=False, **whole)
        (self._directory / META).write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def open_examples(directory: Path, weights: Sequence[float]) -> Examples:
    """Memory-maps examples that an `ExamplesWriter` wrote.

    Args:
      directory: directory of the examples.
      weights: weights of the sources, in order; they are not stored, so that a cached data set
        serves all weights.
    """
    meta = read_object(directory / META)
    with np.load(directory / INDEX) as index:
        lengths, contents, rows = index["lengths"], index["contents"], index["rows"]
        places = Places(meta["files"], index["file_ids"], index["numbers"])
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    flat = {
        name: np.asarray(np.memmap(directory / name, "<i4", "r", shape=(int(offsets[-1]),)))
        for name in (TOKENS, TARGETS)
    }
    sources = zip(meta["parts"], weights, strict=True)
    parts = tuple(SourceSlice(name, form, count, weight) for (name, form, count), weight in sources)
    return Examples(
        tokens=Ragged(flat[TOKENS], offsets),
        targets=Ragged(flat[TARGETS], offsets),
        places=places,
        dropped=meta["dropped"],
        truncated=meta["truncated"],
        unread=tuple(meta["unread"]),
        windows=meta["windows"],
        rejected=meta["rejected"],
        parts=tuple(part for part in parts if part.count),
        contents=contents,
        special=tuple(meta["special"]),
        **{name: meta[name] for name in ("rows_read", "windowed", "merged", "merged_place")},
        rows=rows,
        turns=meta["turns"],
        ends=dict(map(tuple, meta["ends"])),
    )
