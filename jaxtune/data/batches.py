"""Batches of a fixed shape, in an order that can be resumed exactly.

Legend: B is the number of rows of a batch, T the number of tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import numpy as np

from jaxtune.chats.tokens import IGNORE
from jaxtune.data.examples import Examples
from jaxtune.data.passes import OF_NOISE, DataOrder, Pass
from jaxtune.errors import JaxtuneError

Batch = dict[str, np.ndarray]

# Increment whenever the order for the same data and settings changes.
ORDER_VERSION = 2


class _TokenNoise:
    """Replaces random input tokens by tokens drawn from the unigram distribution of the data.

    The pool of replacements is the concatenation of 1024 random examples without special tokens, so
    a uniform draw from it has the data's frequencies, approximately.

    Source: Xie et al., Data Noising as Smoothing in Neural Network Language Models, 2017.
    """

    def __init__(self, examples: Examples, share: float, seed: int):
        self._share, self._seed = share, seed
        self._special = np.array(examples.special, np.int32)
        rng = np.random.default_rng(seed)
        drawn = np.concatenate([examples.tokens[i] for i in rng.integers(len(examples), size=1024)])
        self._pool = drawn[~np.isin(drawn, self._special)]
        if not len(self._pool):
            raise JaxtuneError("data.mask_tokens: the examples contain only special tokens")

    def __call__(self, tokens: np.ndarray, number: int, place: int) -> np.ndarray:
        """Returns the tokens int32[n] of an example after noise; targets are not affected.

        The draw is seeded by the pass `number` and the example's `place` in it, so a resumed run
        repeats it and two copies of an example differ.
        """
        key = np.random.SeedSequence(self._seed, spawn_key=(OF_NOISE, number, place))
        rng = np.random.default_rng(key)
        others = self._pool[rng.integers(len(self._pool), size=len(tokens))]
        chosen = (rng.random(len(tokens)) < self._share) & ~np.isin(tokens, self._special)
        return np.where(chosen, others, tokens)


def _batch(
    examples: Examples,
    plan: Pass,
    step: int,
    length: int,
    reserved: int,
    masking: _TokenNoise | None,
) -> Batch:
    """Returns batch `step` of a pass, with T = `length`.

    The examples of a row follow each other and are numbered as segments 1, 2, …. Each takes
    `reserved` positions and then its tokens: ``[0 … 0, t_1 … t_n]``; the reserved positions belong
    to its segment but have no target. Padding at the end of a row, and rows after the last packed
    one of the pass, keep segment 0 and targets `IGNORE`.
    """
    shape = (plan.batch_size, length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    targets = np.full(shape, IGNORE, np.int32)
    for row, inside in enumerate(plan.rows(step)):
        start = 0
        found = zip(plan.examples[inside].tolist(), plan.places[inside].tolist(), strict=True)
        for segment, (example, place) in enumerate(found, 1):
            ids = examples.tokens[example]
            if masking is not None:
                ids = masking(ids, plan.number, place)
            text, stop = start + reserved, start + reserved + len(ids)
            tokens[row, text:stop] = ids
            targets[row, text:stop] = examples.targets[example]
            segments[row, start:stop] = segment
            positions[row, start:stop] = np.arange(stop - start)
            start = stop
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": positions,
    }


class BatchLoader:
    """An endless iterator of batches, pass after pass over the data.

    A batch consists of ``tokens``, ``targets``, ``segment_ids`` (0: padding; the examples of a row
    are numbered from 1) and ``positions`` (from 0 in each example), int32[B, T] each. Examples
    start with `reserved` extra positions for methods with virtual tokens. A pass shows each example
    as often as the weight of its source, once by default. Its last batch is filled up with empty
    rows (segment 0, targets `IGNORE`).

    Attributes:
      order: order of the examples.
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
          examples: one or more examples.
          batch_size: B.
          length: number of tokens of a row, without reserved ones.
          packing: whether a row has several examples, rather than one.
          shuffle: whether every pass has a new order, a function of `seed` and the pass number.
            Otherwise the order is that of the files, except that packing fills gaps with later
            examples.
          seed: nonnegative integer.
          reserved: number of virtual tokens at the start of each example; T = `length` +
            `reserved`.
          mask_tokens: fraction of tokens to replace at random in every pass, except special tokens.

        Raises:
          JaxtuneError: there are no examples, or one is longer than a row.
        """
        self.order = DataOrder(
            examples,
            batch_size=batch_size,
            length=length,
            packing=packing,
            shuffle=shuffle,
            seed=seed,
            reserved=reserved,
        )
        self._examples, self._reserved, self._length = examples, reserved, length + reserved
        self._masking = _TokenNoise(examples, mask_tokens, seed) if mask_tokens else None
        self._made_from = {
            "data": examples.fingerprint(),
            "batch_size": batch_size,
            "length": length,
            "packing": packing,
            "shuffle": shuffle,
            "seed": seed,
            "reserved": reserved,
        }
        weights = [part.weight for part in examples.parts]
        self._made_from |= {"mask_tokens": mask_tokens} if mask_tokens else {}
        self._made_from |= {"weights": weights} if any(w != 1 for w in weights) else {}
        self._pass = self._step = 0  # position of the next batch

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        plan = self.order.plan(self._pass)
        batch = _batch(
            self._examples, plan, self._step, self._length, self._reserved, self._masking
        )
        self._step += 1
        if self._step == plan.steps:
            self._pass, self._step = self._pass + 1, 0
        return batch

    @property
    def rows(self) -> int:
        """Number of examples in the batches returned so far."""
        shown = int(self.order.plan(self._pass).shown[self._step]) if self._step else 0
        return self.order.rows_before(self._pass) + shown

    def state(self) -> dict[str, Any]:
        """Returns the position after the batches returned so far, JSON-serializable."""
        return {
            "order": ORDER_VERSION,
            "made_from": dict(self._made_from),
            "pass": self._pass,
            "step": self._step,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes at a position; the following batches are bitwise the same.

        Args:
          state: a return value of `state`.

        Raises:
          JaxtuneError: the position was saved with other data or settings, which the message names,
            or by a version of jaxtune that orders the data differently.
        """
        saved = state.get("made_from")
        if not isinstance(saved, Mapping):
            raise JaxtuneError("the saved position in the data is damaged")
        changed = [
            f"{key} was {_short(saved.get(key))} and is {_short(self._made_from.get(key))}"
            for key in {**self._made_from, **saved}
            if saved.get(key) != self._made_from.get(key)
        ]
        if changed:
            raise JaxtuneError(
                f"cannot resume the order of the data: {'; '.join(changed)}; restore the old "
                "value, or start a new run"
            )
        if state.get("order") != ORDER_VERSION:
            raise JaxtuneError(
                "the checkpoint was written by a version of jaxtune that orders the data "
                "differently; resume with that version, or start a new run from its adapter "
                "(adapter.init_from=RUN/adapter/last)"
            )
        number, step = state.get("pass"), state.get("step")
        if not (_is_count(number) and _is_count(step) and step < self.order.plan(number).steps):
            raise JaxtuneError(
                f"the saved position in the data is damaged: pass {number!r}, step {step!r}"
            )
        self._pass, self._step = number, step

    def move_to(self, steps: int) -> None:
        """Moves to the position after a number of batches, whatever order they came in."""
        self._pass = 0
        while steps >= (planned := self.order.plan(self._pass).steps):
            steps -= planned
            self._pass += 1
        self._step = steps


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    """Returns a value as text, with a long hash cut off."""
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


def eval_batches(
    examples: Examples, *, batch_size: int, length: int, packing: bool, reserved: int = 0
) -> Iterator[Batch]:
    """Returns batches with every example exactly once, in the order of the files.

    Args:
      examples: one or more examples.
      batch_size: B; the last batch is filled up with empty rows (segment 0, targets `IGNORE`).
      length: number of tokens of a row, without reserved ones.
      packing: whether a row has several examples, rather than one.
      reserved: number of virtual tokens at the start of each example; T = `length` + `reserved`.

    Returns:
      An iterator of batches in the format of `BatchLoader`, int32[B, T].

    Raises:
      JaxtuneError: there are no examples, or one is longer than a row.
    """
    order = eval_order(
        examples, batch_size=batch_size, length=length, packing=packing, reserved=reserved
    )
    plan = order.plan(0)
    return (
        _batch(examples, plan, step, length + reserved, reserved, None)
        for step in range(plan.steps)
    )


def eval_order(
    examples: Examples, *, batch_size: int, length: int, packing: bool, reserved: int = 0
) -> DataOrder:
    """Returns the order of `eval_batches`, which are its pass 0; see there for the arguments."""
    return DataOrder(
        examples,
        batch_size=batch_size,
        length=length,
        packing=packing,
        shuffle=False,
        seed=0,
        reserved=reserved,
    )
