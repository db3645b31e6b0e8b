"""Merging into quantized weights: requantizes edited weights and measures the rounding loss.

Let W be a weight of the checkpoint, W_q its quantized version, which is the frozen base, and Δ the
adapter's edit. Quantizing W_q + Δ mostly gives W_q again: all values of W_q lie exactly on the
format's grid, and few edits exceed half a grid step. The edit is therefore added to the original:
M = W + Δ is quantized instead. Values of W lie anywhere between grid points, so a small edit moves
some of them across a rounding boundary, and on average the edit survives.

If the checkpoint itself is stored in the format, W is not available and M = W_q + Δ.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtune.adapters.merge import Frozen, MergedRows, decoded, row_chunks
from jaxtune.checkpoints.quantize import encode_rows
from jaxtune.checkpoints.source import TensorSource
from jaxtune.parallel.host import host_device
from jaxtune.quant import QuantizedWeight
from jaxtune.strict_json import read_object

REPORT = "merge_report.json"
FEW = 0.5  # remaining fraction of an edit below which a warning is logged
_logger = logging.getLogger(__name__)


class Squares(NamedTuple):
    """Sums over values, as numbers for whole weights or float32 [rows]; Q is the result.

    Attributes:
      merged: sum of M².
      error: sum of (Q − M)², with Q the dequantized result.
      frozen: sum of W_q².
      edit: sum of Δ².
      along: sum of (Q − W_q) Δ.
      original: sum of W²; 0 if W is not available.
      base_error: sum of (W_q − W)²; 0 if W is not available.
    """

    merged: Any
    error: Any
    frozen: Any
    edit: Any
    along: Any
    original: Any
    base_error: Any

    def measures(self) -> dict[str, float | None]:
        """Returns the measures of a weight; see `Requantizer.report`."""
        known = self.original > 0
        return {
            "error": _root(self.error, self.merged),
            "base_error": _root(self.base_error, self.original) if known else None,
            "edit": _root(self.edit, self.frozen),
            "kept": self.along / self.edit if self.edit else None,
        }


def _root(part: float, whole: float) -> float | None:
    return math.sqrt(part / whole) if whole else None


@jax.jit
def _row_sums(
    frozen: jax.Array, merged: jax.Array, written: jax.Array, original: jax.Array | None
) -> Squares:
    """Returns sums over each row, float32 [rows].

    Sums over a whole weight are accumulated in float64 on the host, since float32 has too few
    digits for them.

    Args:
      frozen: W_q, float32 [rows, in].
      merged: W_q + Δ, float32 [rows, in].
      written: Q, float32 [rows, in].
      original: W [rows, in], or None.
    """
    edit = merged - frozen
    known = frozen if original is None else original.astype(jnp.float32)
    exact = merged if original is None else known + edit
    values = Squares(
        merged=exact**2,
        error=(written - exact) ** 2,
        frozen=frozen**2,
        edit=edit**2,
        along=(written - frozen) * edit,
        original=jnp.zeros_like(frozen) if original is None else known**2,
        base_error=(frozen - known) ** 2,
    )
    return jax.tree.map(functools.partial(jnp.sum, axis=1), values)


def _sum(
    frozen: np.ndarray, merged: MergedRows, written: np.ndarray, original: np.ndarray | None
) -> Squares:
    """Returns sums over a weight [out, in], computed in chunks of rows; see `_row_sums`."""
    totals = np.zeros(len(Squares._fields))
    for rows in row_chunks(frozen.shape):
        known = None if original is None else original[rows]
        with jax.default_device(host_device()):
            sums = _row_sums(frozen[rows], merged(rows, jnp.float32), written[rows], known)
        totals += [np.asarray(each).sum(dtype=np.float64) for each in sums]
    return Squares(*totals.tolist())


class Requantizer:
    """Quantizes merged weights one at a time and records the rounding loss of each."""

    def __init__(self, original: TensorSource | None = None):
        """Starts an empty record.

        Args:
          original: the checkpoint from which the weights were quantized; None if it is not
            available.
        """
        self._original = original
        self._rows: dict[str, Squares] = {}
        self._format = ""

    def __call__(self, name: str, frozen: Frozen, merged: MergedRows) -> dict[str, np.ndarray]:
        """Returns the parts of a merged weight, in the format of the frozen one.

        Args:
          name: name of the weight.
          frozen: the frozen weight W_q [out, in].
          merged: returns rows of W_q + Δ. If it equals W_q, its parts are returned bit for bit.

        Raises:
          JaxtuneError: a merged value is not finite.
        """
        weight, values = frozen.weight, frozen.values
        chunks = row_chunks(values.shape)
        if all(np.array_equal(merged(rows, jnp.float32), values[rows]) for rows in chunks):
            return weight.parts
        original = self._read_original(name, weight)

        def merged_rows(rows: slice) -> np.ndarray:
            # M = W + Δ, with Δ = (W_q + Δ) − W_q; M = W_q + Δ without W.
            edited = merged(rows, jnp.float32)
            if original is None:
                return edited
            return original[rows].astype(np.float32) + (edited - values[rows])

        parts = encode_rows(merged_rows, weight.matrix, weight.format, name, "merged weights")
        written = decoded(dataclasses.replace(weight, parts=parts), jnp.float32)
        self._rows[name] = _sum(values, merged, written, original)
        self._format = weight.format.name
        return parts

    def _read_original(self, name: str, weight: QuantizedWeight) -> np.ndarray | None:
        source = self._original
        # A weight that is stored in this format is W_q itself, not W.
        if source is None or source.read_parts(name, weight.format) is not None:
            return None
        return source.read(name)

    def report(self) -> dict[str, Any]:
        """Returns the measures of all requantized weights.

        Returns:
          ``format``; ``weights``, the ``name`` and measures of each; ``all``, the measures of all
          weights together. The measures are

          - ``error``: ‖Q − M‖ / ‖M‖;
          - ``base_error``: ‖W_q − W‖ / ‖W‖, the error of the quantized base alone; None if W is
            not available;
          - ``edit``: ‖Δ‖ / ‖W_q‖, the relative size of the edit;
          - ``kept``: ⟨Q − W_q, Δ⟩ / ‖Δ‖², the remaining fraction of the edit along its own
            direction: 1 for all of it, 0 for nothing.
        """
        zero = Squares(*(0.0,) * len(Squares._fields))
        everything = Squares(*map(sum, zip(zero, *self._rows.values(), strict=True)))
        return {
            "format": self._format,
            "weights": [{"name": name} | one.measures() for name, one in self._rows.items()],
            "all": everything.measures(),
        }


def warn_of_loss(report: Mapping[str, Any]) -> None:
    """Logs a warning if less than half of an edit is left."""
    kept = report["all"]["kept"]
    if kept is not None and kept < FEW:
        _logger.warning(
            "only %.1f %% of the adapter's edit is left after rounding to %s: merge it in 16 "
            "bits, or keep it apart from the quantized base",
            100 * kept,
            report["format"],
        )


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Writes a report into the directory of the merged checkpoint."""
    text = json.dumps(dict(report), indent=2, ensure_ascii=False) + "\n"
    (directory / REPORT).write_text(text, encoding="utf-8")


def read_report(directory: str | Path) -> dict[str, Any]:
    """Reads the report of a merged checkpoint."""
    return read_object(Path(directory) / REPORT)


def print_report(directory: str | Path, worst: int = 10) -> None:
    """Prints the report of a merged checkpoint, if it has one.

    Args:
      directory: directory of the checkpoint.
      worst: number of weights to show, those with the smallest ``kept`` first.
    """
    if not (Path(directory) / REPORT).is_file():
        return
    report = read_report(directory)
    rows = sorted(report["weights"], key=lambda row: row["kept"])
    title = f"merged into {report['format']}: {len(rows)} weights, least preserved edits first"
    table = Table("weight", *_COLUMNS.values(), title=title, title_justify="left")
    for row in rows[:worst]:
        table.add_row(row["name"].removesuffix(".weight"), *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(report["all"]))
    console = Console()
    console.print(table)
    for what, loss in report.get("loss", {}).items():
        console.print(f"held-out loss, {what.replace('_', ' '):<17} {loss:.4f}")


_COLUMNS = {
    "error": "error",
    "base_error": "base's error",
    "edit": "edit's size",
    "kept": "edit kept",
}


def _cells(row: Mapping[str, float | None]) -> list[str]:
    return ["–" if row[key] is None else f"{row[key]:.2%}" for key in _COLUMNS]
