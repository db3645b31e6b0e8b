"""Batches of a fixed shape from examples, in an order that can be resumed exactly.

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from jaxtune.data.examples import Examples, Part
from jaxtune.data.tokens import IGNORE
from jaxtune.errors import JaxtuneError

Batch = dict[str, np.ndarray]

# Rows that are filled at a time where the order is free. Over lengths drawn from a log-normal of
# median 300 in rows of 1024, 8 leave 9 % of the row empty, 64 leave 4 %, 128 leave 3 %.
_PACKING_ROWS = 64

# Examples are in memory already: a thread would add nothing but a state that runs ahead.
_NO_PREFETCH = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def _check_lengths(examples: Examples, length: int) -> None:
    if not len(examples):
        raise JaxtuneError("no examples to make batches from")
    longest = int(np.argmax(examples.lengths))
    if (count := int(examples.lengths[longest])) > length:
        place = examples.places[longest]
        raise JaxtuneError(f"{place}: {count} tokens do not fit a row of {length}")


class _Source(Sequence[Batch]):
    """Examples, each with `reserved` tokens of no meaning at its head; made when asked for."""

    def __init__(self, examples: Examples, reserved: int, start: int, stop: int):
        self._examples, self._start, self._count = examples, start, stop - start
        self._no_token = np.zeros(reserved, np.int32)
        self._no_target = np.full(reserved, IGNORE, np.int32)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        tokens = self._examples.tokens[self._start + index]
        targets = self._examples.targets[self._start + index]
        return {
            "tokens": np.concatenate([self._no_token, tokens]),
            "targets": np.concatenate([self._no_target, targets]),
        }


def _source(examples: Examples, reserved: int) -> grain.MapDataset:
    return grain.MapDataset.source(_Source(examples, reserved, 0, len(examples)))


class _Mixture(grain.transforms.DatasetSelectionMap):
    """Which example of which part stands where, by weight.

    An epoch takes ``weight × count`` examples of each part. A part is an endless row of epochs of
    its own, and the next epoch goes on where this one stopped: each example is shown as often as
    any other of its part.
    """

    def __init__(self, parts: Sequence[Part]):
        self._counts = [max(1, round(part.weight * part.count)) for part in parts]
        self._ends = list(itertools.accumulate(self._counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[int, int]:
        epoch, place = divmod(index, len(self))
        part = bisect.bisect_right(self._ends, place)
        within = place - (self._ends[part - 1] if part else 0)
        return part, epoch * self._counts[part] + within


def _mixed(examples: Examples, reserved: int, order_seed: int | None) -> grain.MapDataset:
    """Makes a data set whose epochs show each part as often as its weight says."""
    starts = [0, *itertools.accumulate(part.count for part in examples.parts)]
    parts = []
    for index, (start, stop) in enumerate(itertools.pairwise(starts)):
        part = grain.MapDataset.source(_Source(examples, reserved, start, stop))
        if order_seed is not None:
            seed = int(np.random.SeedSequence([order_seed, index]).generate_state(1)[0])
            part = part.shuffle(seed)
        parts.append(part)
    return grain.MapDataset.select_from_datasets(parts, _Mixture(examples.parts))


class _Masking:
    """Replaces tokens by others, drawn as often as they occur in the data: the noise of Xie et al.
    2017, Data Noising as Smoothing in Neural Network Language Models. Targets stay."""

    def __init__(self, examples: Examples, share: float, seed: int):
        self._share, self._special = share, np.array(examples.special, np.int32)
        rng = np.random.default_rng(seed)
        drawn = np.concatenate([examples.tokens[i] for i in rng.integers(len(examples), size=1024)])
        self._pool = drawn[~np.isin(drawn, self._special)]
        if not len(self._pool):
            raise JaxtuneError("data.mask_tokens: the examples hold nothing but special tokens")

    def __call__(self, example: Batch, rng: np.random.Generator) -> Batch:
        tokens = example["tokens"]
        others = self._pool[rng.integers(len(self._pool), size=len(tokens))]
        chosen = (rng.random(len(tokens)) < self._share) & ~np.isin(tokens, self._special)
        return {**example, "tokens": np.where(chosen, others, tokens)}


def _padded_row(example: Batch, length: int) -> Batch:
    """Returns one example as a row, int32[T] each."""
    count = len(example["tokens"])
    row = _empty((length,))
    row["tokens"][:count] = example["tokens"]
    row["targets"][:count] = example["targets"]
    row["segment_ids"][:count] = 1
    row["positions"][:count] = np.arange(count)
    return row


def _empty(shape: tuple[int, ...]) -> Batch:
    names = ("tokens", "segment_ids", "positions")
    return {"targets": np.full(shape, IGNORE, np.int32)} | {
        name: np.zeros(shape, np.int32) for name in names
    }


def _packed_row(row: Batch) -> Batch:
    return {
        "tokens": row["tokens"],
        "targets": row["targets"],
        "segment_ids": row["tokens_segment_ids"],
        "positions": row["tokens_positions"],
    }


def _rows(
    dataset: grain.IterDataset, *, length: int, packing: bool, packing_rows: int, seed: int | None
) -> grain.IterDataset:
    """Turns a stream of examples into one of rows; a seed shuffles the rows filled together."""
    if not packing:
        return dataset.map(lambda example: _padded_row(example, length))
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct={"tokens": length, "targets": length},
        padding_struct={"tokens": 0, "targets": IGNORE},
        num_packing_bins=packing_rows,
        shuffle_bins=seed is not None,
        seed=seed or 0,
    )
    return packed.map(_packed_row)


class Loader:
    """An endless iterator of batches.

    A batch is ``tokens``, ``targets``, ``segment_ids`` (0 is padding, examples count from 1 in each
    row) and ``positions`` (from 0 in each example), int32[B, T] each. Where a method puts virtual
    tokens in front of examples, each has as many more at its head. Batches run on across the end
    of an epoch. Packing places each example in the first row with room among those being filled.
    """

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
        mask_tokens: float = 0.0,
    ):
        """Starts at the first batch.

        Args:
          examples: one or more; an epoch shows each as often as the weight of its part says.
          batch_size: B.
          length: of a row without what is reserved for one example.
          packing: several examples to a row, rather than one.
          shuffle: a new order in every epoch, a function of `seed` and the epoch alone; else
            the order of the file, which packing keeps but for examples that fill gaps.
          seed: any integer from 0.
          reserved: tokens at the head of each example that a method fills; T is `length` and these.
          mask_tokens: share of tokens that are replaced, anew in every epoch; never special ones.

        Raises:
          JaxtuneError: no examples, or one that is longer than a row.
        """
        _check_lengths(examples, length)
        weights = [part.weight for part in examples.parts]
        weighted = any(weight != 1 for weight in weights)
        self._made_from = {
            "data": examples.fingerprint(),
            "batch_size": batch_size,
            "length": length,
            "packing": packing,
            "shuffle": shuffle,
            "seed": seed,
            "reserved": reserved,
        }
        self._made_from |= {"mask_tokens": mask_tokens} if mask_tokens else {}
        self._made_from |= {"weights": weights} if weighted else {}
        length += reserved
        packing_rows, order_seed = batch_size, None
        if shuffle:
            # Grain orders epoch e by seed + e: spread the seeds, or 0 and 1 would share epochs.
            order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
            # No more rows than an epoch fills, or the copies of an example would share rows.
            epoch_rows = (examples.token_count + reserved * len(examples)) // length
            packing_rows = max(batch_size, min(_PACKING_ROWS, epoch_rows))
        dataset = (
            _mixed(examples, reserved, order_seed) if weighted else _source(examples, reserved)
        )
        if order_seed is not None:
            dataset = dataset.shuffle(order_seed)
        dataset = dataset.repeat()
        if mask_tokens:
            # By the place in the endless stream, so that each epoch draws anew.
            dataset = dataset.random_map(_Masking(examples, mask_tokens, seed), seed=seed % 2**32)
        rows = _rows(
            dataset.to_iter_dataset(_NO_PREFETCH),
            length=length,
            packing=packing,
            packing_rows=packing_rows,
            seed=order_seed,
        )
        self._batches = iter(rows.batch(batch_size, drop_remainder=True))

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        """Returns where the stream stands after the batches handed out, fit for JSON."""
        return {"made_from": dict(self._made_from), "iterator": self._batches.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where the stream stood when `state` was taken; what follows is bitwise the same.

        Args:
          state: what `state` returned, perhaps from a file.

        Raises:
          JaxtuneError: the state belongs to other data or settings; the message names them.
        """
        saved = state.get("made_from")
        if not isinstance(saved, Mapping) or "iterator" not in state:
            raise JaxtuneError("the saved position in the data is damaged")
        changed = [
            f"{key} was {_short(saved.get(key))} and is {_short(self._made_from.get(key))}"
            for key in {**self._made_from, **saved}
            if saved.get(key) != self._made_from.get(key)
        ]
        if changed:
            raise JaxtuneError(
                f"cannot go on in the order of the data: {'; '.join(changed)}: "
                "put that back, or start a new run"
            )
        try:
            self._batches.set_state(state["iterator"])
        except (KeyError, TypeError, ValueError) as error:
            raise JaxtuneError(f"the saved position in the data is damaged: {error}") from error


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


def eval_batches(
    examples: Examples, *, batch_size: int, length: int, packing: bool, reserved: int = 0
) -> Iterator[Batch]:
    """Gives every example exactly once, in the order of the file.

    Args:
      examples: one or more.
      batch_size: B; the last batch is filled up with empty rows (segment 0, targets `IGNORE`).
      length: of a row without what is reserved for one example.
      packing: several examples to a row, rather than one.
      reserved: tokens at the head of each example that a method fills; T is `length` and these.

    Returns:
      An iterator of batches as `Loader` gives them, int32[B, T].

    Raises:
      JaxtuneError: no examples, or one that is longer than a row.
    """
    _check_lengths(examples, length)
    rows = _rows(
        _source(examples, reserved).to_iter_dataset(_NO_PREFETCH),
        length=length + reserved,
        packing=packing,
        packing_rows=batch_size,
        seed=None,
    )
    return (_filled(batch, batch_size) for batch in rows.batch(batch_size, drop_remainder=False))


def _filled(batch: Batch, batch_size: int) -> Batch:
    """Adds empty rows up to `batch_size`."""
    count, length = batch["tokens"].shape
    empty = _empty((batch_size - count, length))
    return {name: np.concatenate([value, empty[name]]) for name, value in batch.items()}
