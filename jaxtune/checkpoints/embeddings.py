"""The embedding and the head of a checkpoint: tied or not, and for how many tokens."""

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
_ROWS = 2048  # that are compared or summed at a time
_logger = logging.getLogger(__name__)


class EmbeddingSource(WrappedSource):
    """A checkpoint whose embedding or head is another tensor of it, or has more rows."""

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
          changes: of config.json.
          aliases: by the name of a tensor, the name of the one that is read in its place.
          rows: of embedding and head; those that the checkpoint lacks are the mean of its own.
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
        """Returns parts, of the format's shapes, if stored in just this format and of this size."""
        return None if self._grows(name) else self._source.read_parts(self._name(name), form)

    def where(self, name: str) -> str:
        """Returns the file that a tensor is read from."""
        return self._source.where(self._name(name))


def with_stored_head(source: TensorSource) -> TensorSource:
    """Returns a checkpoint whose config says whether embedding and head are one matrix.

    A config.json may tie them while the files hold both, as merges of a trained head leave them.
    Equal ones are tied; different ones are not, and the log says so. Where only the head is there,
    it is the embedding as well. transformers does the same.

    Raises:
      JaxtuneError: config.json has something other than true or false there.
    """
    names = source.names()
    if not read(source.config, TIED, bool, False) or HEAD not in names:
        return source
    if EMBEDDING not in names:
        return EmbeddingSource(source, {}, {EMBEDDING: HEAD})
    if _equal(source, EMBEDDING, HEAD):
        return source
    _logger.warning(
        '%s: config.json ties the head to the embedding ("%s": true), and the checkpoint has a '
        "%s of its own: that one is used, and the model is not tied",
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
    """Returns a checkpoint whose head is a copy of its embedding, where it was the embedding."""
    if not source.config.get(TIED):
        return source
    return EmbeddingSource(source, {TIED: False}, {HEAD: EMBEDDING})


def with_vocabulary(source: TensorSource, size: int) -> TensorSource:
    """Returns a checkpoint with room for `size` tokens.

    New rows of embedding and head are the mean of those that are there.

    Raises:
      JaxtuneError: fewer tokens than the checkpoint has, or a checkpoint whose embedding, head and
        config.json do not have the same number of them.
    """
    present = source.shape(EMBEDDING)[0]
    others = {'"vocab_size" of config.json': source.config.get("vocab_size")}
    if HEAD in source.names():
        others[HEAD] = source.shape(HEAD)[0]
    for name, count in others.items():
        if count != present:
            raise JaxtuneError(
                f"{source.path}: {EMBEDDING} has {present} rows, and {name} is for {count} tokens: "
                "it cannot be enlarged before they agree"
            )
    if size < present:
        raise JaxtuneError(
            f"{source.path}: a vocabulary of {size} is smaller than that of the checkpoint, which "
            f"has {present} tokens: it can only grow"
        )
    return EmbeddingSource(source, {"vocab_size": size}, rows=size)
