"""Batches of a fixed shape from examples, in an order that can be resumed exactly.

Legend: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from jaxtune.data.examples import Examples
from jaxtune.data.template import IGNORE
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
    for tokens, place in zip(examples.tokens, examples.places, strict=True):
        if len(tokens) > length:
            raise JaxtuneError(f"{place}: {len(tokens)} tokens do not fit a row of {length}")


def _source(examples: Examples, reserved: int) -> grain.MapDataset:
    """Makes a data set of examples, each with `reserved` tokens of no meaning at its head."""
    no_token, no_target = np.zeros(reserved, np.int32), np.full(reserved, IGNORE, np.int32)
    pairs = zip(examples.tokens, examples.targets, strict=True)
    return grain.MapDataset.source(
        [
            {"tokens": np.concatenate([no_token, t]), "targets": np.concatenate([no_target, y])}
            for t, y in pairs
        ]
    )


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
    ):
        """Starts at the first batch.

        Args:
          examples: one or more.
          batch_size: B.
          length: of a row without what is reserved for one example.
          packing: several examples to a row, rather than one.
          shuffle: a new order in every epoch, a function of `seed` and the epoch alone; else
            the order of the file, which packing keeps but for examples that fill gaps.
          seed: any integer from 0.
          reserved: tokens at the head of each example that a method fills; T is `length` and these.

        Raises:
          JaxtuneError: no examples, or one that is longer than a row.
        """
        _check_lengths(examples, length)
        self._made_from = {
            "data": examples.fingerprint(),
            "batch_size": batch_size,
            "length": length,
            "packing": packing,
            "shuffle": shuffle,
            "seed": seed,
            "reserved": reserved,
        }
        length += reserved
        dataset = _source(examples, reserved)
        packing_rows, order_seed = batch_size, None
        if shuffle:
            # Grain orders epoch e by seed + e: spread the seeds, or 0 and 1 would share epochs.
            order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
            dataset = dataset.shuffle(order_seed)
            # No more rows than an epoch fills, or the copies of an example would share rows.
            epoch_rows = (examples.token_count + reserved * len(examples)) // length
            packing_rows = max(batch_size, min(_PACKING_ROWS, epoch_rows))
        rows = _rows(
            dataset.repeat().to_iter_dataset(_NO_PREFETCH),
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
            f"{key} was {_short(saved.get(key))} and is {_short(value)}"
            for key, value in self._made_from.items()
            if saved.get(key) != value
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
