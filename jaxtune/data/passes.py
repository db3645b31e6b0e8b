"""Passes over the data: the assignment of examples to rows and batches, planned from lengths alone.

A pass is a function of the data, the config and its number, so any pass can be planned again when a
run is resumed. It starts with a new batch, and its last batch is filled up with empty rows, so that
no batch contains examples of two passes. A plan has four steps: choose the examples by the weights
of their sources, shuffle them, pack them into rows, and shuffle the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple, TypedDict

import numpy as np

from jaxtune.data.examples import Examples, SourceSlice
from jaxtune.data.packing import pack_rows
from jaxtune.errors import JaxtuneError

# Open rows of packing when the order is shuffled. More rows hardly reduce the padding.
_PACKING_ROWS = 256
# First element of the spawn key of each random stream, to keep the streams independent.
_OF_PASS, _OF_ROWS, _OF_PART, OF_NOISE = range(4)


class Pass(NamedTuple):
    """A pass: n examples in R packed rows and S batches.

    Attributes:
      number: number of the pass, from 0.
      examples: int64[n], indices of the examples, row by row.
      places: int64[n], position of each example in the pass before shuffling; distinguishes the
        copies of an example that a weight above 1 creates.
      starts: int64[R + 1], start of each packed row in `examples`; the last entry is n.
      batch_size: number of packed rows per batch.
      shown: int64[S + 1], number of examples before each batch; the last entry is n.
      tokens: int64[S + 1], number of tokens before each batch; the last entry is the total.
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
        """Number of batches of the pass."""
        return len(self.shown) - 1

    def rows(self, step: int) -> list[slice]:
        """Returns the slice of `examples` of each packed row of batch `step`, from 0."""
        first = step * self.batch_size
        bounds = self.starts[first : first + self.batch_size + 1].tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


class OrderOptions(TypedDict):
    """Options of `DataOrder` that the config decides; see `BatchLoader` for their meaning."""

    batch_size: int
    length: int
    packing: bool
    shuffle: bool
    seed: int


class DataOrder:
    """The passes of a run, each planned on demand."""

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
        """Checks the examples; for the arguments see `BatchLoader`.

        Raises:
          JaxtuneError: there are no examples, or one is longer than a row.
        """
        _check_lengths(examples, length)
        self._lengths = examples.lengths + reserved
        self._parts = examples.parts or (SourceSlice("", "", len(examples)),)
        # Exact fractions: with floats, rounding errors would add up over the passes.
        self._taken = [max(Fraction(str(p.weight)) * p.count, Fraction(1)) for p in self._parts]
        self._batch_size, self._capacity = batch_size, length + reserved
        self._packing, self._shuffle, self._seed = packing, shuffle, seed
        self._recent: dict[int, Pass] = {}

    @property
    def rows_per_pass(self) -> float:
        """Average number of examples of a pass, with repetitions."""
        total = sum(self._taken, Fraction())
        return int(total) if total.denominator == 1 else float(total)

    def rows_before(self, number: int) -> int:
        """Returns the total number of examples in the passes before pass `number`."""
        return sum(math.ceil(number * amount) for amount in self._taken)

    def filled(self, plan: Pass) -> float:
        """Returns the share of positions in the batches of a pass that are not padding."""
        return float(plan.tokens[-1] / (plan.steps * self._batch_size * self._capacity))

    def plan(self, number: int, advance: Callable[[int], None] | None = None) -> Pass:
        """Returns pass `number`, from 0.

        Args:
          number: number of the pass.
          advance: progress callback, called with the number of examples planned since the last
            call.
        """
        if number in self._recent:
            if advance is not None:
                advance(len(self._recent[number].examples))
        else:
            # Keeps two passes: consecutive steps may belong to different ones.
            for other in list(self._recent)[:-1]:
                del self._recent[other]
            self._recent[number] = self._make(number, advance)
        return self._recent[number]

    def _make(self, number: int, advance: Callable[[int], None] | None) -> Pass:
        """Plans a pass.

        `places` [n] is the order in which the examples are shown, as indices into the pass before
        shuffling. Packing assigns a row to each of them; a stable sort by row then groups the
        examples of a row and keeps their order, and the cumulative counts are the starts of rows.
        """
        examples = self._examples_of_pass(number)
        places = np.arange(len(examples))
        if self._shuffle:
            places = _permutation(len(examples), self._seed, _OF_PASS, number)
        starts = np.arange(len(examples) + 1)
        if self._packing:
            # Without shuffling, few open rows keep the order close to that of the files.
            open_rows = _PACKING_ROWS if self._shuffle else self._batch_size
            lengths = self._lengths[examples[places]]
            rows = pack_rows(lengths, self._capacity, open_rows, advance)
            if self._shuffle:
                # Rows are shuffled as well, because those opened last are less full.
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
        """Returns the examples of a pass, int64[n], source by source.

        A pass takes ``weight × count`` examples of each source, at least one; n passes take n times
        that, rounded up. A source is an endless sequence of rounds over its examples, and each pass
        continues where the previous one stopped, so all examples of a source are shown equally
        often. With 10 examples and weight 0.25, pass 0 takes items 0–2 of round 0, pass 1 items
        3–4, pass 2 items 5–7. A round that is split between passes is shuffled as a whole first.
        """
        taken, first = [], 0
        for index, (part, amount) in enumerate(zip(self._parts, self._taken, strict=True)):
            start, stop = math.ceil(number * amount), math.ceil((number + 1) * amount)
            for turn in range(start // part.count, -(-stop // part.count)):
                begin = max(start - turn * part.count, 0)
                end = min(stop - turn * part.count, part.count)
                order = np.arange(part.count)
                # A round within one pass needs no separate shuffle, because the pass is shuffled.
                if self._shuffle and end - begin < part.count:
                    order = _permutation(part.count, self._seed, _OF_PART, turn, index)
                taken.append(first + order[begin:end])
            first += part.count
        return np.concatenate(taken)


def _permutation(count: int, seed: int, *key: int) -> np.ndarray:
    """Returns a random permutation of the numbers below `count`, int64[count].

    Sorts raw bits of a bit generator, whose stream NumPy guarantees across versions. It does not
    guarantee `permutation`, and a run may be resumed with another version.
    """
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def _check_lengths(examples: Examples, length: int) -> None:
    if not len(examples):
        raise JaxtuneError("there are no examples to make batches from")
    longest = int(np.argmax(examples.lengths))
    if (count := int(examples.lengths[longest])) > length:
        place = examples.places[longest]
        raise JaxtuneError(f"{place}: {count} tokens do not fit into a row of {length}")
