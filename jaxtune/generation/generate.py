"""Generation for a batch of prompts, as an iterator over chunks of new tokens.

`Generation` is the interface for everything that shows, stops or scores answers while they are
generated; `generate_tokens` runs it to the end. The compiled functions are in
`jaxtune.generation.decoding`. To compile few shapes, the number of rows, the width of the prompts
and the capacity of the cache are rounded up to sizes of `bucket`; the cache grows from one capacity
to the next between chunks. A call with other prompts, limits or settings compiles nothing if its
sizes have been used before.

Rows do not depend on their neighbours, except for rounding: a longer prompt or more rows give other
shapes, for which sums are rounded differently. The random numbers of a row also depend on its index
in the batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtune.errors import JaxtuneError, check_argument, shown
from jaxtune.generation.decoding import (
    CHUNK,
    NO_TOKEN,
    Chosen,
    Controls,
    State,
    decode_chunk,
    grow,
    prefill,
)
from jaxtune.generation.sampling import Sampling, check_sampling
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.parallel.processes import fetch
from jaxtune.parallel.rules import devices_along
from jaxtune.vocabulary import check_token_ids

# Smallest sizes of `bucket` for prompts, caches and the list of end tokens.
PROMPT_MULTIPLE, CACHE_MULTIPLE, END_MULTIPLE = 32, 128, 8


def bucket(size: int, multiple: int, steps: int = 1) -> int:
    """Returns the smallest bucket that holds `size` ≥ 0.

    Buckets are the powers of two, with `steps` equal steps from each to the next, but no step is
    smaller than `multiple`, a power of two.
    """
    size = max(size, 1)
    octave = 1 << (max(size - 1, 1).bit_length() - 1)  # the largest power of two below the size
    step = max(multiple, octave // steps)
    return -(-size // step) * step


class Answer(NamedTuple):
    """New tokens of one row.

    Attributes:
      tokens: token ids, without the end token.
      log_probs: log-probabilities under the model, in nats, of `tokens` and of the end token after
        them, if there is one. Temperature, top_k and top_p do not change them.
      end: id of the end token, or None if there is none (yet).
    """

    tokens: list[int]
    log_probs: list[float]
    end: int | None


class Generation(Iterator[list[Answer]]):
    """Answers to a batch of prompts, computed in chunks.

    Each iteration returns the new tokens of every row, in the order of the prompts. The first has
    one token per row, and the following have 2, 4, 8, … up to `largest_chunk`, so that the first
    tokens are known early. Generation can be cancelled by not iterating any further. In several
    processes, all must iterate and end rows alike.

    Attributes:
      finished: bool[rows], whether the answer of a row is complete.
    """

    def __init__(
        self,
        definition: Definition,
        trees: tuple[Tree, Tree, Tree],
        prompts: Sequence[Sequence[int]],
        options: ForwardOptions,
        *,
        max_new_tokens: int | Sequence[int],
        sampling: Sampling,
        stop: Sequence[int],
        mesh: Mesh | None = None,
        largest_chunk: int = CHUNK,
    ):
        """Checks the arguments; the model runs from the first iteration on.

        Args:
          definition: definition of the model.
          trees: base, trainable, constants.
          prompts: token ids, at least one each.
          options: compute dtype and attention backend.
          max_new_tokens: maximum number of new tokens, of all rows or of each.
          sampling: settings for choosing tokens.
          stop: token ids that end an answer.
          mesh: mesh of the trees; by default the mesh in context.
          largest_chunk: maximum number of tokens per row and iteration, at most `CHUNK`.

        Raises:
          JaxtuneError: an empty prompt, ids outside the vocabulary, or settings out of range.
        """
        check_argument("prompts", prompts, (Sequence, np.ndarray), "a list of prompts")
        check_argument("stop", stop, Collection, "a list of token ids")
        check_argument("largest_chunk", largest_chunk, (int, np.integer), "a number of tokens")
        if largest_chunk < 1:
            raise JaxtuneError(f"largest_chunk={largest_chunk} is not a number of tokens ≥ 1")
        limits = _read_limits(max_new_tokens, len(prompts))
        _check(definition, prompts, sampling, stop)
        self.finished = np.zeros(len(prompts), bool)
        self._definition, self._trees, self._options = definition, trees, options
        self._mesh, self._largest = mesh, min(largest_chunk, CHUNK)
        reserved = [0] * definition.reserved
        self._prompts = [[*reserved, *prompt] for prompt in prompts]
        self._limits, self._stop = limits, frozenset(int(token) for token in stop)
        self._sampling = sampling
        self._count = 0  # tokens generated so far
        self._steps = 2  # maximum number of tokens of the next chunk
        self._state: State | None = None

    def __next__(self) -> list[Answer]:
        """Returns the new tokens of each row."""
        if self.finished.all():
            self._state = None  # frees the caches
            raise StopIteration
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            chosen = self._prefill() if self._state is None else self._decode(self._state)
        tokens, log_probs = (np.asarray(array) for array in fetch(chosen))
        return [self._read(row, tokens[row], log_probs[row]) for row in range(len(self._prompts))]

    def end(self, row: int) -> None:
        """Completes the answer of a row, which gets no more tokens.

        Raises:
          JaxtuneError: there is no such row.
        """
        check_argument("row", row, (int, np.integer), "the number of a prompt")
        if not 0 <= row < len(self.finished):
            raise JaxtuneError(f"there is no row {row}: rows are 0 to {len(self.finished) - 1}")
        self.finished[row] = True

    def complete(self) -> list[Answer]:
        """Iterates to the end in the largest chunks; returns all their tokens, for each row."""
        self._steps = self._largest
        answers = [Answer([], [], None) for _ in self._prompts]
        for chunk in self:
            for row, new in enumerate(chunk):
                answers[row] = Answer(
                    answers[row].tokens + new.tokens,
                    answers[row].log_probs + new.log_probs,
                    new.end if answers[row].end is None else answers[row].end,
                )
        return answers

    def _prefill(self) -> Chosen:
        lengths = [len(prompt) for prompt in self._prompts]
        devices = devices_along("batch")
        rows = -(-bucket(len(lengths), 1) // devices) * devices
        # Rows beyond the prompts have one token of padding and no new ones.
        self._padded = rows - len(lengths)
        self._width = bucket(max(lengths), PROMPT_MULTIPLE, steps=4)
        tokens = np.zeros((rows, self._width), np.int32)
        for row, prompt in zip(tokens, self._prompts, strict=False):
            row[self._width - len(prompt) :] = prompt
        end = np.full(bucket(len(self._stop), END_MULTIPLE), NO_TOKEN, np.int32)
        end[: len(self._stop)] = sorted(self._stop)
        self._controls = Controls(
            np.pad(self._limits, (0, self._padded)).astype(np.int32),
            end,
            Sampling(
                float(self._sampling.temperature),
                float(self._sampling.top_p),
                int(self._sampling.seed),
                int(self._sampling.top_k),
            ),
        )
        self._capacity = _cache_bucket(self._width + min(int(self._limits.max()), CHUNK))
        self._state, chosen = prefill(
            self._trees,
            tokens,
            np.array(lengths + [1] * self._padded, np.int32),
            self._controls,
            definition=self._definition,
            options=self._options,
            capacity=self._capacity,
        )
        self._count = 1
        return chosen

    def _decode(self, state: State) -> Chosen:
        # The token generated last is not in the cache yet.
        left = int(self._limits[~self.finished].max()) - self._count
        steps = min(self._steps, self._largest, left)
        needed = self._width + self._count - 1 + steps
        if needed > self._capacity:
            self._capacity = _cache_bucket(needed)
            state = grow(state, definition=self._definition, capacity=self._capacity)
            self._state = state  # frees the smaller caches
        self._state, chosen = decode_chunk(
            self._trees,
            state,
            np.pad(self.finished, (0, self._padded), constant_values=True),
            np.int32(steps),
            self._controls,
            definition=self._definition,
            options=self._options,
        )
        self._count += steps
        self._steps *= 2
        return chosen

    def _read(self, row: int, tokens: np.ndarray, log_probs: np.ndarray) -> Answer:
        """Returns the new tokens of a row, and notes whether it is finished."""
        if self.finished[row]:
            return Answer([], [], None)
        count = int((tokens != NO_TOKEN).sum())
        new, end = tokens[:count].tolist(), None
        if new and new[-1] in self._stop:
            end = new.pop()
        self.finished[row] = end is not None or self._count >= self._limits[row]
        return Answer(new, log_probs[:count].tolist(), end)


def _cache_bucket(length: int) -> int:
    return bucket(length, CACHE_MULTIPLE, steps=2)


def generate_tokens(
    definition: Definition,
    trees: tuple[Tree, Tree, Tree],
    prompts: Sequence[Sequence[int]],
    options: ForwardOptions,
    *,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    stop: Sequence[int],
) -> list[list[int]]:
    """Continues a batch of prompts of any lengths; see `Generation`.

    Returns:
      The ids of the new tokens of each prompt, without the end token.

    Raises:
      JaxtuneError: an empty prompt, ids outside the vocabulary, or settings out of range.
    """
    generation = Generation(
        definition,
        trees,
        prompts,
        options,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
    )
    return [answer.tokens for answer in generation.complete()]


def _read_limits(given: int | Sequence[int], rows: int) -> np.ndarray:
    """Returns the maximum number of new tokens of each row, int32[rows].

    Raises:
      JaxtuneError: a value is out of range, or there is another number of values than of rows.
    """
    try:
        values = np.asarray(given, object)  # keeps integers of any size, and bool apart from int
    except ValueError:  # arrays of different shapes
        raise JaxtuneError("max_new_tokens is neither a number nor a list of numbers") from None
    if values.shape not in ((), (rows,)):
        shape = " × ".join(map(str, values.shape))
        raise JaxtuneError(
            f"max_new_tokens has {shape} values for {rows} prompt(s): give one number for all "
            "prompts, or one per prompt"
        )
    for value in values.flat:
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not integer or not 1 <= value < 2**31:
            raise JaxtuneError(
                f"max_new_tokens={shown(value)} is not a number of tokens ≥ 1 and < 2³¹"
            )
    return np.broadcast_to(values.astype(np.int32), rows)


def _check(
    definition: Definition,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop: Sequence[int],
) -> None:
    """Raises if an argument of `Generation` is out of range."""
    for index, prompt in enumerate(prompts):
        check_token_ids(prompt, definition.vocab_size, f"prompt {index + 1}")
        if np.ndim(prompt) != 1:
            raise JaxtuneError(f"prompt {index + 1} is not a list of token ids")
        if not len(prompt):
            raise JaxtuneError(f"prompt {index + 1} has no tokens")
    check_sampling(sampling)
    check_token_ids(stop, definition.vocab_size, "the tokens that end an answer (eos_token_id)")
