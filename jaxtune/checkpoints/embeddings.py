"""Embedding and head of a checkpoint: tying, untying and resizing."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtune.checkpoints.source import ALL, TensorSource, WrappedSource
from jaxtune.errors import JaxtuneError
from jaxtune.models.hf_config import read
from jaxtune.quant import Format

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = "tie_word_embeddings"
_ROWS = 2048  # rows compared or summed at a time
_logger = logging.getLogger(__name__)


class EmbeddingSource(WrappedSource):
    """A checkpoint whose embedding or head is an alias of another tensor, or has more rows."""

    def __init__(
        self,
        source: TensorSource,
        changes: Mapping[str, Any],
        aliases: Mapping[str, str] | None = None,
        rows: int | None = None,
    ):
        """Wraps a checkpoint.

        Args:
          source: the checkpoint.
          changes: changed entries of config.json.
          aliases: names of the tensors to read, by the names under which they appear.
          rows: number of rows of embedding and head; new rows are the mean of existing ones.
        """
        super().__init__(source)
        self.config = {**source.config, **changes}
        self._aliases, self._rows = dict(aliases or {}), rows
        self._mean = functools.lru_cache(maxsize=2)(self._mean_row)

    def _name(self, name: str) -> str:
        return self._aliases.get(name, name)

    def _grows(self, name: str) -> bool:
        return self._rows is not None and name in (EMBEDDING, HEAD)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(dict.fromkeys([*self._source.names(), *self._aliases]))

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        shape = self._source.shape(self._name(name))
        return (self._rows, *shape[1:]) if self._rows and self._grows(name) else shape

    def dtype(self, name: str) -> np.dtype:
        """Returns the dtype that `read` gives."""
        return self._source.dtype(self._name(name))

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it."""
        own = self._name(name)
        if not self._grows(name):
            return self._source.read(own, rows)
        (height, *_), start, stop = self._source.shape(own), *rows.indices(self.shape(name)[0])[:2]
        stored = self._source.read(own, slice(min(start, height), min(stop, height)))
        added = max(stop - max(start, height), 0)
        if not added:
            return stored
        return np.concatenate([stored, np.repeat(self._mean(own)[None], added, axis=0)])

    def _mean_row(self, name: str) -> np.ndarray:
        height = self._source.shape(name)[0]
        total = np.float64(0)
        for first in range(0, height, _ROWS):
            some = self._source.read(name, slice(first, min(first + _ROWS, height)))
            total = total + some.astype(np.float64).sum(axis=0)
        return (total / height).astype(self._source.dtype(name))

    def read_parts(self, name: str, form: Format) -> dict[str, np.ndarray] | None:
        """Returns the parts, of the format's shapes, or None; see `TensorSource.read_parts`."""
        return None if self._grows(name) else self._source.read_parts(self._name(name), form)

    def where(self, name: str) -> str:
        """Returns the file that a tensor is read from."""
        return self._source.where(self._name(name))


def with_stored_head(source: TensorSource) -> TensorSource:
    """Returns a checkpoint whose config agrees with its files on whether the head is tied.

    config.json may tie the head to the embedding although the files hold both, for example after
    merging a trained head. Equal tensors stay tied; different ones are untied, with a warning. If
    the files hold only the head, it is used as the embedding too. transformers does the same.

    Raises:
      JaxtuneError: ``tie_word_embeddings`` is neither true nor false.
    """
    names = source.names()
    if not read(source.config, TIED, bool, False) or HEAD not in names:
        return source
    if EMBEDDING not in names:
        return EmbeddingSource(source, {}, {EMBEDDING: HEAD})
    if _equal(source, EMBEDDING, HEAD):
        return source
    _logger.warning(
        '%s: config.json ties the head to the embedding ("%s": true), but the checkpoint has '
        "another %s: using that one, untied",
        source.path,
        TIED,
        HEAD,
    )
    source.config = {**source.config, TIED: False}
    return source


def _equal(source: TensorSource, one: str, other: str) -> bool:
    shape = source.shape(one)
    if source.shape(other) != shape:
        return False
    chunks = (slice(first, first + _ROWS) for first in range(0, shape[0], _ROWS))
    return all(
        np.array_equal(
            source.read(one, rows).astype(np.float32), source.read(other, rows).astype(np.float32)
        )
        for rows in chunks
    )


def untied(source: TensorSource) -> TensorSource:
    """Returns a checkpoint whose tied head, if it has one, is a separate copy of the embedding."""
    if not source.config.get(TIED):
        return source
    return EmbeddingSource(source, {TIED: False}, {HEAD: EMBEDDING})


def with_vocabulary(source: TensorSource, size: int) -> TensorSource:
    """Returns a checkpoint whose vocabulary is enlarged to `size` tokens.

    New rows of embedding and head are the mean of the existing rows.

    Raises:
      JaxtuneError: `size` is less than the checkpoint's, or embedding, head and config.json
        disagree on the number of tokens.
    """
    present = source.shape(EMBEDDING)[0]
    others = {'"vocab_size" of config.json': source.config.get("vocab_size")}
    if HEAD in source.names():
        others[HEAD] = source.shape(HEAD)[0]
    for name, count in others.items():
        if count != present:
            raise JaxtuneError(
                f"{source.path}: {EMBEDDING} has {present} rows, but {name} is for {count} tokens: "
                "they must agree before the vocabulary can be enlarged"
            )
    if size < present:
        raise JaxtuneError(
            f"{source.path}: a vocabulary of {size} tokens is smaller than the checkpoint's, "
            f"{present}: it can only be enlarged"
        )
    return EmbeddingSource(source, {"vocab_size": size}, rows=size)
