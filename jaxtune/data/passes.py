"""Passes over the data: which examples stand in which row of which batch, known from the lengths of
the examples alone.

A pass is a function of the data, the config and its number. It begins with a new batch, and its
last batch is filled up with empty rows, so that no batch holds examples of two passes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from jaxtune.data.examples import Examples, SourceSlice
from jaxtune.data.packing import pack_rows
from jaxtune.errors import JaxtuneError

# Rows that are filled at a time where the order is free. More of them leave hardly less empty.
_PACKING_ROWS = 256
# What a random draw is for: equal numbers elsewhere must not give equal draws.
_OF_PASS, _OF_ROWS, _OF_PART, OF_NOISE = range(4)


class Pass(NamedTuple):
    """One pass: n examples in R packed rows, which make S batches.

    Attributes:
      number: of the pass, from 0.
      examples: int64[n], packed row after packed row.
      places: int64[n], the place of each in the pass before it was shuffled. It tells the copies of
        an example apart that a weight brings.
      starts: int64[R + 1], where each packed row begins in `examples`, and n.
      batch_size: packed rows of a batch.
      shown: int64[S + 1], examples before each batch, and n.
      tokens: int64[S + 1], their tokens.
    """

    number: int
    examples: np.ndarray
    places: np.ndarray
    starts: np.ndarray
    batch_size: int
    shown: np.ndarray
    tokens: np.ndarray

    @property
    def steps(self) -> int:
        """Batches of the pass."""
        return len(self.shown) - 1

    def rows(self, step: int) -> list[slice]:
        """Returns where the examples of each packed row of batch `step`, from 0, stand."""
        first = step * self.batch_size
        bounds = self.starts[first : first + self.batch_size + 1].tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class DataOrder:
    """The passes of a run, each of which is planned when it is asked for."""

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        length: int,
        packing: bool,
        shuffle: bool,
        seed: int,
        reserved: int = 0,
    ):
        """Plans nothing yet; the arguments are those of `Loader`.

        Raises:
          JaxtuneError: no examples, or one that is longer than a row.
        """
        _check_lengths(examples, length)
        self._lengths = examples.lengths + reserved
        self._parts = examples.parts or (SourceSlice("", "", len(examples)),)
        # Exact, so that what passes take adds up to what the weights say.
        self._taken = [max(Fraction(str(p.weight)) * p.count, Fraction(1)) for p in self._parts]
        self._batch_size, self._capacity = batch_size, length + reserved
        self._packing, self._shuffle, self._seed = packing, shuffle, seed
        self._recent: dict[int, Pass] = {}

    @property
    def rows_per_pass(self) -> float:
        """Examples that a pass shows on average; one that is shown twice is counted twice."""
        total = sum(self._taken, Fraction())
        return int(total) if total.denominator == 1 else float(total)

    def rows_before(self, number: int) -> int:
        """Returns how many examples the passes before pass `number` show."""
        return sum(math.ceil(number * amount) for amount in self._taken)

    def filled(self, plan: Pass) -> float:
        """Returns the share of the positions in the batches of a pass that hold a token."""
        return float(plan.tokens[-1] / (plan.steps * self._batch_size * self._capacity))

    def plan(self, number: int, advance: Callable[[int], None] | None = None) -> Pass:
        """Returns pass `number`, from 0.

        Args:
          number: of the pass.
          advance: is told of examples that are packed, now and then.
        """
        if number in self._recent:
            if advance is not None:
                advance(len(self._recent[number].examples))
        else:
            # Two, for a step may be the last of one and the next the first of another.
            for other in list(self._recent)[:-1]:
                del self._recent[other]
            self._recent[number] = self._make(number, advance)
        return self._recent[number]

    def _make(self, number: int, advance: Callable[[int], None] | None) -> Pass:
        examples = self._examples_of_pass(number)
        places = np.arange(len(examples))
        if self._shuffle:
            places = _permutation(len(examples), self._seed, _OF_PASS, number)
        starts = np.arange(len(examples) + 1)
        if self._packing:
            # In the order of the files, as few rows as a batch has keep neighbours together.
            open_rows = _PACKING_ROWS if self._shuffle else self._batch_size
            lengths = self._lengths[examples[places]]
            rows = pack_rows(lengths, self._capacity, open_rows, advance)
            if self._shuffle:
                # The rows that are opened last are less full than the others.
                rows = _permutation(int(rows.max()) + 1, self._seed, _OF_ROWS, number)[rows]
            places = places[np.argsort(rows, kind="stable")]
            starts = np.concatenate([[0], np.cumsum(np.bincount(rows))])
        elif advance is not None:
            advance(len(examples))
        examples = examples[places]
        shown = np.append(starts[: -1 : self._batch_size], len(examples))
        tokens = np.concatenate([[0], np.cumsum(self._lengths[examples])])[shown]
        return Pass(number, examples, places, starts, self._batch_size, shown, tokens)

    def _examples_of_pass(self, number: int) -> np.ndarray:
        """Returns the examples that a pass takes, int64[n], part after part.

        It takes ``weight × count`` of each part, and at least one: n passes take n times that,
        rounded up. A part is an endless series of rounds over its examples, and the next pass
        continues where this one stops: each example is shown as often as any other of its part.
        """
        taken, first = [], 0
        for index, (part, amount) in enumerate(zip(self._parts, self._taken, strict=True)):
            start, stop = math.ceil(number * amount), math.ceil((number + 1) * amount)
            for turn in range(start // part.count, -(-stop // part.count)):
                begin = max(start - turn * part.count, 0)
                end = min(stop - turn * part.count, part.count)
                order = np.arange(part.count)
                # The shuffle of the pass is enough for a whole round.
                if self._shuffle and end - begin < part.count:
                    order = _permutation(part.count, self._seed, _OF_PART, turn, index)
                taken.append(first + order[begin:end])
            first += part.count
        return np.concatenate(taken)


def _permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """Returns the numbers below `count` in random order, int64[count].

    NumPy promises the bits of its bit generators to stay, and not those of its `permutation`: a run
    may resume under another version.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def _check_lengths(examples: Examples, length: int) -> None:
    if not len(examples):
        raise JaxtuneError("no examples to make batches from")
    longest = int(np.argmax(examples.lengths))
    if (count := int(examples.lengths[longest])) > length:
        place = examples.places[longest]
        raise JaxtuneError(f"{place}: {count} tokens do not fit a row of {length}")
