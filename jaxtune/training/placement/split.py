"""The split of a batch into micro-batches and devices, with empty rows where it is uneven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from jaxtune.config.length import divisors_of
from jaxtune.objectives.cross_entropy import IGNORE


class BatchSplit(NamedTuple):
    """The split of the rows of an optimizer step.

    Attributes:
      rows: rows of a batch.
      shares: number of devices that split a batch.
      accumulation: number of micro-batches.
    """

    rows: int
    shares: int
    accumulation: int

    @property
    def rows_per_device(self) -> int:
        """Rows of a micro-batch on each device."""
        return -(-self.rows // (self.accumulation * self.shares))

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch over all devices, with empty ones."""
        return self.rows_per_device * self.shares

    @property
    def padded_rows(self) -> int:
        """Rows of a step over all devices and micro-batches, with empty ones."""
        return self.accumulation * self.micro_rows

    def warning(self) -> str:
        """Returns the share of empty rows and the nearest batch sizes without; empty if none."""
        unit = self.accumulation * self.shares
        if self.padded_rows == self.rows:
            return ""
        sizes = [size for size in (self.rows // unit * unit, self.padded_rows) if size]
        micro = f" × {self.accumulation} micro-batches" if self.accumulation > 1 else ""
        return (
            f"training.batch_size={self.rows} does not fill {self.shares} devices{micro}: "
            f"{1 - self.rows / self.padded_rows:.0%} of each step is padding; "
            f"training.batch_size={' or '.join(map(str, sizes))} has none"
        )

    def pieces(self, rows: int) -> tuple[int, int]:
        """Returns the split of another batch, such as one for evaluation.

        Args:
          rows: rows of the batch.

        Returns:
          The number of pieces, and the rows of each, with empty ones: a multiple of `shares` and at
          most `micro_rows`.
        """
        count = -(-rows // self.micro_rows)
        return count, -(-rows // (count * self.shares)) * self.shares


def fewest_micro_batches(rows: int, shares: int, fits: Callable[[int], bool]) -> int:
    """Returns the smallest number of micro-batches that fit into the memory of the devices.

    Only numbers that split the rows of a device evenly are considered. If none fits, it is the
    largest one: a row at a time.

    Args:
      rows: rows of a batch.
      shares: number of devices that split a batch.
      fits: returns whether a micro-batch with a number of rows per device fits.
    """
    each = -(-rows // shares)
    return next((count for count in divisors_of(each) if fits(each // count)), each)


def pad_rows(batch: Mapping[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
    """Appends empty rows (segment 0, targets `IGNORE`) to the arrays [n, T] of a batch.

    Args:
      batch: arrays by name; the empty rows of all but ``targets`` are zeros.
      rows: number of rows afterwards.
    """
    padded = {}
    for name, array in batch.items():
        value = IGNORE if name == "targets" else 0
        missing = ((0, rows - len(array)), (0, 0))
        padded[name] = np.pad(array, missing, constant_values=value) if missing[0][1] else array
    return padded
