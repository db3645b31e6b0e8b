"""Training and held-out splits, without overlap."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np

from jaxtune.chats.clock import now
from jaxtune.config import Config, DataConfig
from jaxtune.data.encode import Problem
from jaxtune.data.examples import Examples, join
from jaxtune.data.prepare import default_cache, load_examples
from jaxtune.data.settings import data_settings
from jaxtune.data.sources import find_sources, path_exists
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """The training and held-out examples of a run.

    Attributes:
      train: training examples.
      sets: held-out examples by the name of their set; empty for a single unnamed set.
    """

    train: Examples
    sets: dict[str, Examples]

    @property
    def held_out(self) -> Examples | None:
        """All held-out examples; None if there are none."""
        return join([*self.sets.values()]) if self.sets else None


class ReaderOptions(TypedDict, total=False):
    """Options of `DataReader`, all optional."""

    keep: bool
    workers: int
    problems: list[Problem] | None
    chat_template: str | None
    clock: datetime.datetime | None
    rows: Mapping[str, Any] | None


class DataReader:
    """Reads data sets according to the ``data`` section of a config."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int | None,
        *,
        max_positions: int | None = None,
        keep: bool = False,
        workers: int = 1,
        problems: list[Problem] | None = None,
        chat_template: str | None = None,
        clock: datetime.datetime | None = None,
        rows: Mapping[str, Any] | None = None,
    ):
        """Initializes the reader.

        Args:
          config: resolved config.
          tokenizer: tokenizer of the model, if it has one.
          vocab_size: vocabulary size of the model; None: unchecked.
          max_positions: max_position_embeddings of the model; None: unknown.
          keep: whether to write tokenized data to the cache.
          workers: number of processes that tokenize.
          problems: list to which rejected rows are appended instead of raising an error.
          chat_template: Jinja source that replaces the config's template; empty: the tokenizer's
            own.
          clock: time that the template prints in all rows; now by default.
          rows: rows in memory by their entry in ``data.train`` or ``data.eval``.
        """
        self._rows = rows
        self._section, self._max_positions = config.data, max_positions
        self.cache = config.data.cache or default_cache()
        settings = data_settings(config.data, seed=config.training.seed, vocab_size=vocab_size)
        if chat_template is not None:
            settings = dataclasses.replace(settings, chat_template="", template_text=chat_template)
        self._settings = dataclasses.replace(settings, clock=clock or now())
        self._load = functools.partial(
            load_examples,
            tokenizer=tokenizer,
            revision=config.data.revision or None,
            # A cached data set has no record of its rejected rows.
            cache=None if problems is not None else self.cache,
            keep=keep,
            workers=workers,
            problems=problems,
            rows=rows,
        )

    def read(self, path: str, *, training: bool = False) -> Examples:
        """Loads a data set and logs a summary.

        Args:
          path: sources in the syntax of ``data.train``.
          training: whether weights are allowed and prompt templates applied.

        Raises:
          JaxtuneError: a row is not valid.
        """
        settings = self._settings
        if not training:
            settings = dataclasses.replace(settings, prompt_templates="")
        examples = self._load(path, settings)
        if not training and any(part.weight != 1 for part in examples.parts):
            raise JaxtuneError(f"data.eval={path}: held-out data has no weights; remove the @")
        _log_summary(path, examples)
        self._warn_long_positions(path, examples, training)
        return examples

    def _warn_long_positions(self, path: str, examples: Examples, training: bool) -> None:
        """Warns if examples are longer than the model's max_position_embeddings."""
        limit, max_length = self._max_positions, self._section.max_length
        if limit is None or max_length <= limit:
            return
        if beyond := int((examples.lengths > limit).sum()):
            logger.warning(
                "%s: %d of %d examples (up to %d tokens) are longer than the model's "
                "max_position_embeddings=%d, so it was not trained on such positions",
                path,
                beyond,
                len(examples),
                examples.lengths.max(),
                limit,
            )
        elif training:
            logger.warning(
                "data.max_length=%d exceeds the model's max_position_embeddings=%d",
                max_length,
                limit,
            )

    def splits(self) -> Splits:
        """Loads the training and held-out examples.

        Raises:
          JaxtuneError: data.train is not set, both data.eval and data.eval_split are, a row is not
            valid, or a row is in both splits.
        """
        section = self._section
        check_sources(section, self._rows)
        train = self.read(section.train, training=True)
        if section.eval_split:
            return hold_out(train, section.eval_split)
        sets = self.read_sets(section.eval)
        for held_out in sets.values():
            train = resolve_overlap(train, held_out, section.overlap)
        return Splits(train, sets)

    def read_sets(self, text: str) -> dict[str, Examples]:
        """Loads held-out examples by the name of their set; see `parse_eval_sets`."""
        return {name: self.read(path) for name, path in parse_eval_sets(text).items()}


def check_sources(section: DataConfig, rows: Mapping[str, Any] | None = None) -> None:
    """Checks that the sources of a run are set and that those on this machine exist.

    Nothing is read, so a misspelled path is reported before anything that takes time.

    Args:
      section: ``data`` section of a config.
      rows: rows in memory by their entry; see `find_sources`.

    Raises:
      JaxtuneError: data.train is not set, both data.eval and data.eval_split are, or a file does
        not exist.
    """
    if not section.train:
        raise JaxtuneError("data.train is empty; set it to a JSONL file or a data set's hub id")
    if section.eval and section.eval_split:
        raise JaxtuneError("data.eval and data.eval_split are mutually exclusive; set only one")
    for source in (section.train, *parse_eval_sets(section.eval).values()):
        find_sources(source, rows=rows)


def parse_eval_sets(text: str) -> dict[str, str]:
    """Parses ``data.eval``: a path, or named paths as in ``law=a.jsonl,code=b.jsonl``.

    Returns:
      Paths by name; the name of a single unnamed path is empty.

    Raises:
      JaxtuneError: a name is used twice, or only some entries have a name.
    """
    if not text:
        return {}
    if not re.match(r"\w+=", text) or path_exists(text):
        return {"": text}
    sets: dict[str, str] = {}
    for entry in text.split(","):
        name, _, path = (part.strip() for part in entry.partition("="))
        if not re.fullmatch(r"\w+", name) or not path:
            raise JaxtuneError(f'data.eval: "{entry}" is not of the form NAME=PATH')
        if name in sets:
            raise JaxtuneError(f'data.eval: duplicate name "{name}"')
        sets[name] = path
    return sets


def hold_out(examples: Examples, amount: float) -> Splits:
    """Splits examples by the content of their rows, so that duplicates are in the same split.

    Rows are sorted by content hash and the first ones are held out. The selection does not depend
    on the order of the files, and rows that are added or removed hardly change it.

    Args:
      examples: examples with `contents`.
      amount: rows to hold out: a count, or a fraction below 1. Duplicates count once.

    Raises:
      JaxtuneError: one split would be empty, or the count is not an integer.
    """
    contents = examples.contents
    assert contents is not None  # examples that were read from rows have them
    distinct = np.unique(contents)
    count = round(amount * len(distinct)) if amount < 1 else int(amount)
    if amount >= 1 and count != amount:
        raise JaxtuneError(
            f"data.eval_split={amount:g} must be a fraction below 1 or an integer number of rows"
        )
    if not 0 < count < len(distinct):
        raise JaxtuneError(
            f"data.eval_split={amount:g} holds out {count} of {len(distinct)} distinct rows; both "
            "splits need at least one"
        )
    outside = contents <= distinct[count - 1]
    train, held_out = (examples.select(np.flatnonzero(side)) for side in (~outside, outside))
    logger.info("held out: %d of %d examples", len(held_out), len(examples))
    return Splits(train, {"": held_out})


def resolve_overlap(train: Examples, held_out: Examples, overlap: str) -> Examples:
    """Returns the training examples after handling those that are also held out.

    Args:
      train: training examples with `contents`.
      held_out: held-out examples with `contents`.
      overlap: treatment of examples in both splits: ``error``, ``drop`` (from `train`) or ``keep``.

    Raises:
      JaxtuneError: there is overlap and `overlap` is ``error``, or no training examples are left.
    """
    assert train.contents is not None and held_out.contents is not None
    shared = np.isin(train.contents, held_out.contents)
    count = int(shared.sum())
    if not count:
        return train
    first = int(np.flatnonzero(shared)[0])
    other = int(np.flatnonzero(held_out.contents == train.contents[first])[0])
    what = (
        f"{count} of {len(train)} training examples are also held out, e.g. "
        f"{train.places[first]} and {held_out.places[other]}"
    )
    if overlap == "error":
        raise JaxtuneError(f"{what}; set data.overlap to drop (from data.train) or keep")
    logger.warning("%s (data.overlap=%s)", what, overlap)
    if overlap == "keep":
        return train
    if count == len(train):
        raise JaxtuneError(f"{what}; data.overlap=drop leaves no training examples")
    return train.select(np.flatnonzero(~shared))


def _log_summary(path: str, examples: Examples) -> None:
    logger.info(
        "%s: %d rows read, %d examples, %d tokens (%d targets); %d dropped, %d truncated, "
        "%d windows from %d long rows, %d duplicates, %d bad rows skipped",
        path,
        examples.rows_read,
        len(examples),
        examples.token_count,
        examples.target_count,
        examples.dropped,
        examples.truncated,
        examples.windows,
        examples.windowed,
        examples.duplicates,
        sum(examples.rejected.values()),
    )
    if examples.merged:
        logger.warning(
            "%s: in %d of %d rows (e.g. %s) a token spans the end of the prompt and the start of "
            "the answer; it is a target, and the prompt alone is tokenized differently (put "
            "whitespace at the start of completions rather than at the end of prompts, and not at "
            "the start of answers in chats)",
            path,
            examples.merged,
            examples.rows_read,
            examples.merged_place,
        )
    for what, count in examples.turns.items():
        logger.info("%s: turns: %s: %d", path, what, count)
    if examples.unread:
        logger.warning("%s: unused keys: %s", path, ", ".join(examples.unread))
