"""What is trained on and what is held out, with nothing on both sides."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxtune.chats.clock import now
from jaxtune.config import Config
from jaxtune.data.encode import Problem, settings_from
from jaxtune.data.examples import Examples, join
from jaxtune.data.load import default_cache, load_examples
from jaxtune.data.sources import exists
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """The two sides of a run's data.

    Attributes:
      train: what is trained on.
      sets: what is held out, by name; a single set may have an empty one.
    """

    train: Examples
    sets: dict[str, Examples]

    @property
    def held_out(self) -> Examples | None:
        """All that is held out, or None where nothing is."""
        return join([*self.sets.values()]) if self.sets else None


class DataReader:
    """Reads data sets as the ``data`` section of a config says."""

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
    ):
        """Takes a resolved config and what reads its rows.

        Args:
          config: resolved.
          tokenizer: of the model, if it has one.
          vocab_size: of the model: token ids are below this.
          max_positions: of the model, its max_position_embeddings; None: not known.
          keep: whether to leave what is tokenized in the cache.
          workers: processes that tokenize.
          problems: takes rows that give no example, none of which is an error then.
          chat_template: Jinja source in place of what the config names; empty: the tokenizer's
            own.
          clock: the time that a template prints, in all rows; now by default.
        """
        self._section, self._max_positions = config.data, max_positions
        self.cache = config.data.cache or default_cache()
        settings = settings_from(config.data, seed=config.training.seed, vocab_size=vocab_size)
        if chat_template is not None:
            settings = dataclasses.replace(settings, chat_template="", template_text=chat_template)
        self._settings = dataclasses.replace(settings, clock=clock or now())
        self._options: dict[str, Any] = {
            "tokenizer": tokenizer,
            "revision": config.data.revision or None,
            # Rows that were skipped before are to be told again.
            "cache": None if problems is not None else self.cache,
            "keep": keep,
            "workers": workers,
            "problems": problems,
        }

    def read(self, path: str, *, training: bool = False) -> Examples:
        """Loads one data set and says in the log what is in it.

        Args:
          path: what ``data.train`` takes.
          training: whether weights and wordings are for it.

        Raises:
          JaxtuneError: an example is not usable.
        """
        changes = {} if training else {"prompt_templates": ""}
        examples = load_examples(path, settings=self._settings, **changes, **self._options)
        if not training and any(part.weight != 1 for part in examples.parts):
            raise JaxtuneError(f"data.eval={path}: held-out data takes no weights: leave out the @")
        _log(path, examples)
        self._compare_positions(path, examples, training)
        return examples

    def _compare_positions(self, path: str, examples: Examples, training: bool) -> None:
        """Warns of more positions than the model's config has."""
        limit, max_length = self._max_positions, self._section.max_length
        if limit is None or max_length <= limit:
            return
        if beyond := int((examples.lengths > limit).sum()):
            logger.warning(
                "%s: %d of %d examples, the longest of %d tokens, are longer than the model's "
                "max_position_embeddings=%d: it has not learned such positions",
                path,
                beyond,
                len(examples),
                examples.lengths.max(),
                limit,
            )
        elif training:
            logger.warning(
                "data.max_length=%d is more than the model's max_position_embeddings=%d",
                max_length,
                limit,
            )

    def splits(self) -> Splits:
        """Loads what is trained on and what is held out.

        Raises:
          JaxtuneError: no training set is configured, both ways of holding out are, an example is
            not usable, or rows are on both sides.
        """
        section = self._section
        if not section.train:
            raise JaxtuneError("data.train is empty: give a JSONL file or a data set's hub id")
        if section.eval and section.eval_split:
            raise JaxtuneError("data.eval and data.eval_split both hold examples out: choose one")
        train = self.read(section.train, training=True)
        if section.eval_split:
            return hold_out(train, section.eval_split)
        sets = self.read_sets(section.eval)
        for held_out in sets.values():
            train = without_overlap(train, held_out, section.overlap)
        return Splits(train, sets)

    def read_sets(self, text: str) -> dict[str, Examples]:
        """Loads held-out examples by the name of their set; see `eval_sets` for the text."""
        return {name: self.read(path) for name, path in eval_sets(text).items()}


def eval_sets(text: str) -> dict[str, str]:
    """Reads ``data.eval``: a path, or several of them by name as in ``law=a.jsonl,code=b.jsonl``.

    Returns:
      Paths by name; a single path has an empty name.

    Raises:
      JaxtuneError: a name is there twice, or some entries have a name and others none.
    """
    if not text:
        return {}
    if not re.match(r"\w+=", text) or exists(text):
        return {"": text}
    sets: dict[str, str] = {}
    for entry in text.split(","):
        name, _, path = (part.strip() for part in entry.partition("="))
        if not re.fullmatch(r"\w+", name) or not path:
            raise JaxtuneError(f'data.eval: "{entry}" is not a name and a file, as in law=a.jsonl')
        if name in sets:
            raise JaxtuneError(f'data.eval: two sets have the name "{name}"')
        sets[name] = path
    return sets


def hold_out(examples: Examples, amount: float) -> Splits:
    """Splits examples by what their rows say, so that equal rows are on one side.

    Rows are ordered by a hash of what they say, and the first of them are held out: which ones does
    not depend on the order of the file, and hardly on what else is in it.

    Args:
      examples: with their contents.
      amount: of rows: a number, or below 1 a share. Where the last of them has duplicates, those
        are held out beside it.

    Raises:
      JaxtuneError: one side would be empty, or examples do not divide into such a number of rows.
    """
    contents = examples.contents
    assert contents is not None  # whatever was read from rows has them
    distinct = np.unique(contents)
    count = round(amount * len(distinct)) if amount < 1 else int(amount)
    if amount >= 1 and count != amount:
        raise JaxtuneError(f"data.eval_split={amount:g} is neither a share nor a number of rows")
    if not 0 < count < len(distinct):
        raise JaxtuneError(
            f"data.eval_split={amount:g} holds {count} of {len(distinct)} different rows out: "
            "both sides need some"
        )
    outside = contents <= distinct[count - 1]
    train, held_out = (examples.select(np.flatnonzero(side)) for side in (~outside, outside))
    logger.info("held out: %d of %d examples", len(held_out), len(examples))
    return Splits(train, {"": held_out})


def without_overlap(train: Examples, held_out: Examples, overlap: str) -> Examples:
    """Returns what may be trained on.

    Args:
      train: with contents.
      held_out: with contents.
      overlap: what becomes of examples that are in both: ``error``, ``drop`` or ``keep``.

    Raises:
      JaxtuneError: such an example is an error, or nothing else is left.
    """
    assert train.contents is not None and held_out.contents is not None
    shared = np.isin(train.contents, held_out.contents)
    count = int(shared.sum())
    if not count:
        return train
    first = int(np.flatnonzero(shared)[0])
    other = int(np.flatnonzero(held_out.contents == train.contents[first])[0])
    what = (
        f"{count} of {len(train)} training examples are held out too, such as "
        f"{train.places[first]} and {held_out.places[other]}"
    )
    if overlap == "error":
        raise JaxtuneError(f"{what}: set data.overlap to drop (from data.train) or keep")
    logger.warning("%s (data.overlap=%s)", what, overlap)
    if overlap == "keep":
        return train
    if count == len(train):
        raise JaxtuneError(f"{what}: with data.overlap=drop nothing is left to train on")
    return train.select(np.flatnonzero(~shared))


def _log(path: str, examples: Examples) -> None:
    logger.info(
        "%s: %d rows read, %d examples, %d tokens, %d of them targets; %d dropped, %d truncated, "
        "%d windows of %d longer rows, %d duplicates, %d bad rows skipped",
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
            "%s: in %d of %d rows, such as %s, one token holds the end of the prompt and the "
            "beginning of the answer: it is learnt, and the prompt alone would end in other "
            "tokens (put white space at the beginning of completions and not at the end of "
            "prompts, and none at the beginning of answers in chats)",
            path,
            examples.merged,
            examples.rows_read,
            examples.merged_place,
        )
    for what, count in examples.turns.items():
        logger.info("%s: turns: %s: %d", path, what, count)
    if examples.unread:
        logger.warning("%s: keys that nothing reads: %s", path, ", ".join(examples.unread))
