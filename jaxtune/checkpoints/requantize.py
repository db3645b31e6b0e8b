"""Merging into quantized weights: each one is rounded anew, and what that costs is measured.

A frozen weight W_q, which is W rounded, has an edit Δ. Rounded anew, W_q + Δ is mostly W_q again:
its values are the very ones that a format has, and few are moved by half a step. So the edit is put
where the base came from: what is quantized is M = W + Δ, of which each value is as far from the
next step as chance will have it, and the edit survives on average. Only where the checkpoint has no
more bits than the base is M = W_q + Δ.
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

from jaxtune.checkpoints.quantize import CHUNK, encode_rows
from jaxtune.checkpoints.source import TensorSource
from jaxtune.quant import QuantizedWeight

REPORT = "merge_report.json"
FEW = 0.5
_logger = logging.getLogger(__name__)


class Squares(NamedTuple):
    """Sums over the values of one weight, of several, or of each row: numbers, or float32 [rows].

    Attributes:
      merged: of M².
      error: of (Q − M)², where Q is what is written, dequantized.
      frozen: of W_q².
      edit: of Δ².
      along: of (Q − W_q) Δ.
      original: of W²; 0 where W is not known.
      base_error: of (W_q − W)²; 0 where W is not known.
    """

    merged: Any
    error: Any
    frozen: Any
    edit: Any
    along: Any
    original: Any
    base_error: Any

    def measures(self) -> dict[str, float | None]:
        """Returns what `Requantizer.report` says of a weight."""
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
def _decode(weight: QuantizedWeight) -> jax.Array:
    return weight.dequantize(jnp.float32)


@jax.jit
def _row_sums(
    frozen: jax.Array, merged: jax.Array, written: jax.Array, original: jax.Array | None
) -> Squares:
    """Returns sums over each of some rows, float32 [rows]: those over a weight need more digits."""
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


def _sum(*arrays: np.ndarray | None) -> Squares:
    """Returns sums over whole weights, [out, in] each, of which some rows are looked at at a time.

    The arrays are those of `_row_sums`.
    """
    assert arrays[0] is not None
    rows, columns = arrays[0].shape
    step, totals = max(CHUNK // columns, 1), np.zeros(len(Squares._fields))
    for first in range(0, rows, step):
        some = (None if a is None else a[first : first + step] for a in arrays)
        totals += [np.asarray(sums).sum(dtype=np.float64) for sums in _row_sums(*some)]
    return Squares(*totals.tolist())


class Requantizer:
    """Quantizes merged weights one at a time, and remembers what became of each."""

    def __init__(self, original: TensorSource | None = None):
        """Starts with no weights.

        Args:
          original: the checkpoint that the weights were quantized from; None where they were not
            quantized from just this.
        """
        self._original = original
        self._rows: dict[str, Squares] = {}
        self._format = ""

    def __call__(
        self, name: str, weight: QuantizedWeight, merged: jax.Array
    ) -> dict[str, np.ndarray]:
        """Returns the parts of a merged weight, in the format of the frozen one.

        Args:
          name: of the weight.
          weight: the frozen one, [out, in].
          merged: the frozen one with its edit, float32 [out, in]; where the edit is none, the
            frozen one is kept bit for bit.

        Raises:
          JaxtuneError: a merged value is not finite.
        """
        edited, frozen = np.asarray(merged), np.asarray(_decode(weight))
        if np.array_equal(edited, frozen):
            return {key: np.asarray(part) for key, part in weight.parts.items()}
        original = self._read_original(name, weight)

        def exact(rows: slice) -> np.ndarray:
            if original is None:
                return edited[rows]
            return original[rows].astype(np.float32) + (edited[rows] - frozen[rows])

        parts = encode_rows(exact, weight.matrix, weight.format, f"{name} as merged")
        written = np.asarray(_decode(dataclasses.replace(weight, parts=parts)))
        self._rows[name] = _sum(frozen, edited, written, original)
        self._format = weight.format.name
        return parts

    def _read_original(self, name: str, weight: QuantizedWeight) -> np.ndarray | None:
        source = self._original
        # What is stored in this very format is the frozen weight itself.
        if source is None or source.read_parts(name, weight.format) is not None:
            return None
        return source.read(name)

    def report(self) -> dict[str, Any]:
        """Returns what became of the weights.

        Returns:
          ``format``; ``weights``, with the ``name`` of each and its measures; ``all``, the measures
          of all of them taken as one. Of the measures ``error`` is ‖Q − M‖ / ‖M‖; ``base_error``
          that of the quantized base alone, ‖W_q − W‖ / ‖W‖, or None where W is not known and the
          edit was put on W_q; ``edit`` is ‖Δ‖ / ‖W_q‖; ``kept`` is ⟨Q − W_q, Δ⟩ / ‖Δ‖²: how much
          of the edit is left along its own direction, 1 for all of it and 0 for nothing.
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
            "of what the adapter changes only %.1f %% is left after rounding to %s: merge it in 16 "
            "bits, or keep it beside the quantized base",
            100 * kept,
            report["format"],
        )


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """Writes a report beside the weights that it is of."""
    text = json.dumps(dict(report), indent=2, ensure_ascii=False) + "\n"
    (directory / REPORT).write_text(text, encoding="utf-8")


def read_report(directory: str | Path) -> dict[str, Any]:
    """Reads the report of a merged checkpoint."""
    return json.loads((Path(directory) / REPORT).read_text(encoding="utf-8"))


def print_report(directory: str | Path, worst: int = 10) -> None:
    """Prints the report of a merged checkpoint, where it has one.

    Args:
      directory: of the checkpoint.
      worst: how many weights to show: those of whose edits the least is left.
    """
    if not (Path(directory) / REPORT).is_file():
        return
    report = read_report(directory)
    rows = sorted(report["weights"], key=lambda row: row["kept"])
    title = f"merged into {report['format']}: {len(rows)} weights, those that keep least first"
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
