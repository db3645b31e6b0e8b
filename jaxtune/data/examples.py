"""Training examples: every row of a data set as token ids and the targets to predict."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxtune.data.formats import FORMATS, detect, unread_keys
from jaxtune.data.read import Row, read_rows
from jaxtune.data.template import IGNORE, ChatTemplate, Tokenized, read_template
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOO_LONG = ("error", "drop", "truncate")
_SECONDS_BEFORE_PROGRESS = 2.0


@dataclasses.dataclass(frozen=True)
class Examples:
    """A data set in memory, in the order of its file.

    Attributes:
      tokens: int32[n] per example; n differs between examples.
      targets: int32[n] per example: the token to predict after ``tokens[t]``, or `IGNORE`.
      places: where each example came from, ``"train.jsonl:17"``.
      dropped: how many were left out for being too long.
      truncated: how many lost their end for being too long.
      unread: keys that rows had and their form does not read.
    """

    tokens: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]
    places: Sequence[str]
    dropped: int = 0
    truncated: int = 0
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def token_count(self) -> int:
        """Tokens of all examples together."""
        return sum(len(tokens) for tokens in self.tokens)

    @property
    def target_count(self) -> int:
        """Targets of all examples together."""
        return sum(int(np.count_nonzero(targets != IGNORE)) for targets in self.targets)

    def fingerprint(self) -> str:
        """Returns the SHA-256, in hexadecimal, of all tokens and targets in order."""
        digest = hashlib.sha256()
        for tokens, targets in zip(self.tokens, self.targets, strict=True):
            # The length keeps two short examples from looking like one long one.
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(tokens, "<i4").tobytes())
            digest.update(np.ascontiguousarray(targets, "<i4").tobytes())
        return digest.hexdigest()


def load_examples(
    source: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    too_long: str = "error",
    chat_template: str = "",
    vocab_size: int | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> Examples:
    """Reads, renders and tokenizes a whole data set.

    Args:
      source: what `read_rows` takes: a JSONL file, a saved data set or a hub id.
      tokenizer: a fast tokenizer; None where every row is input_ids + labels.
      max_length: most tokens of an example.
      too_long: what becomes of a longer one: ``error``, ``drop`` or ``truncate`` (its end).
      chat_template: a Jinja file or the name of a built-in template, used in place of the
        tokenizer's own; empty: its own.
      vocab_size: token ids are below this; None: unchecked.
      revision: commit, tag or branch of a hub id.
      progress: whether to show a bar on a terminal once it takes over two seconds.

    Raises:
      JaxtuneError: a row that cannot be read or rendered, has nothing to learn, is too long or
        holds ids outside the vocabulary; the message names the row. Or there is nothing left.
    """
    if too_long not in _TOO_LONG:
        raise JaxtuneError(f"data.too_long takes one of {', '.join(_TOO_LONG)}, not {too_long!r}")
    template = None if tokenizer is None else ChatTemplate(tokenizer, read_template(chat_template))
    tokens, targets, places, unread = [], [], [], set()
    form, first, counts = "", "", collections.Counter()
    for row in _shown(read_rows(source, revision=revision), f"reading {source}", progress):
        found = detect(row)
        form, first = form or found, first or row.place
        if found != form:
            raise JaxtuneError(f"{row.place}: a row of {found} where {first} is of {form}")
        unread |= unread_keys(row, form)
        example = FORMATS[form].encode(row, template)
        _check_ids(example, vocab_size, row.place)
        if len(example.tokens) > max_length:
            if too_long == "error":
                raise _over_long(row.place, len(example.tokens), max_length)
            counts[too_long] += 1
            if too_long == "drop":
                continue
        row_tokens, row_targets = _shifted(example, max_length, row.place)
        tokens.append(row_tokens)
        targets.append(row_targets)
        places.append(row.place)
    if not tokens:
        left_out = f": all {counts['drop']} are over data.max_length={max_length} and were dropped"
        raise JaxtuneError(f"{source}: no examples{left_out if counts['drop'] else ''}")
    unread_sorted = tuple(sorted(unread))
    return Examples(tokens, targets, places, counts["drop"], counts["truncate"], unread_sorted)


def _over_long(place: str, count: int, max_length: int) -> JaxtuneError:
    return JaxtuneError(
        f"{place}: {count} tokens, and data.max_length is {max_length}: raise it, or set "
        "data.too_long to drop or truncate"
    )


def _check_ids(example: Tokenized, vocab_size: int | None, place: str) -> None:
    limit = 2**31 if vocab_size is None else vocab_size
    labels = (label for label in example.labels if label != IGNORE)
    for name, ids in (("input_ids", example.tokens), ("labels", labels)):
        for token in ids:
            if not 0 <= token < limit:
                raise JaxtuneError(
                    f"{place}: {name} holds {token}, and the vocabulary has ids 0 to {limit - 1}"
                )


def _shifted(example: Tokenized, max_length: int, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and targets, int32[n] with n at most `max_length`."""
    tokens = np.asarray(example.tokens[:max_length], np.int32)
    targets = np.full(len(tokens), IGNORE, np.int32)
    targets[:-1] = example.labels[1:max_length]
    if (targets == IGNORE).all():
        cut = len(example.tokens) > max_length
        raise JaxtuneError(
            f"{place}: no target"
            + (f" within data.max_length={max_length} tokens" if cut else ", so nothing to learn")
        )
    return tokens, targets


def _shown(rows: Iterator[Row], description: str, enabled: bool) -> Iterator[Row]:
    """Passes rows on; counts them on a terminal once that takes long."""
    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield from rows
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
    )
    begin, bar = time.monotonic(), Progress(*columns, console=console, transient=True)
    with contextlib.ExitStack() as stack:
        task, showing = bar.add_task(description, total=None), False
        for row in rows:
            if not showing and time.monotonic() - begin > _SECONDS_BEFORE_PROGRESS:
                stack.enter_context(bar)
                showing = True
            bar.advance(task)
            yield row
