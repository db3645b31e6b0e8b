"""Merging into quantized weights: each one is rounded anew, and what that costs is measured.

A weight W_q = dequantized, with an edit: M = W_q + Δ. What is written is Q = dequantized(quantized
M), and of a small Δ little may be left, for most values are rounded back to where they were.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from jaxtune.checkpoints.quantize import encode_rows
from jaxtune.checkpoints.source import TensorSource
from jaxtune.quant import QuantizedWeight

REPORT = "merge_report.json"


class Squares(NamedTuple):
    """Sums over the values of one weight, or of several.

    Attributes:
      merged: of M².
      error: of (Q − M)².
      frozen: of W_q².
      edit: of Δ².
      along: of (Q − W_q) Δ.
      original: of W², the weight before it was quantized; 0 where it is not known.
      base_error: of (W_q − W)²; 0 where W is not known.
    """

    merged: float
    error: float
    frozen: float
    edit: float
    along: float
    original: float
    base_error: float

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
def _frozen(weight: QuantizedWeight, merged: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns W_q, float32 [out, in], and whether the edit changes any of its values."""
    frozen = weight.dequantize(jnp.float32)
    return frozen, jnp.any(frozen != merged)


@jax.jit
def _row_sums(
    frozen: jax.Array, merged: jax.Array, new: QuantizedWeight, original: jax.Array | None
) -> Squares:
    """Returns sums over each row, float32 [out]: those over a whole weight need more digits."""
    written = new.dequantize(jnp.float32)
    edit = merged - frozen
    known = frozen if original is None else original.astype(jnp.float32)
    values = Squares(
        merged=merged**2,
        error=(written - merged) ** 2,
        frozen=frozen**2,
        edit=edit**2,
        along=(written - frozen) * edit,
        original=jnp.zeros_like(frozen) if original is None else known**2,
        base_error=(frozen - known) ** 2,
    )
    return jax.tree.map(functools.partial(jnp.sum, axis=1), values)


class Requantizer:
    """Quantizes merged weights one at a time, and remembers what became of each."""

    def __init__(self, original: TensorSource | None = None):
        """Starts with no weights.

        Args:
          original: the checkpoint that the weights were quantized from; None where it is not the
            base that is merged into.
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
          merged: float32 [out, in]; where it is the frozen one, that is kept bit for bit.

        Raises:
          JaxtuneError: a merged value is not finite.
        """
        form, shape = weight.format, weight.matrix
        frozen, changed = _frozen(weight, merged)
        if not changed:
            return {key: np.asarray(part) for key, part in weight.parts.items()}
        host = np.asarray(merged)
        parts = encode_rows(lambda rows: host[rows], shape, form, f"{name} as merged")
        new = dataclasses.replace(weight, parts=parts)
        sums = _row_sums(frozen, merged, new, self._read_original(name, weight))
        self._rows[name] = Squares(
            *(float(np.asarray(each).sum(dtype=np.float64)) for each in sums)
        )
        self._format = form.name
        return parts

    def _read_original(self, name: str, weight: QuantizedWeight) -> np.ndarray | None:
        source = self._original
        # A checkpoint that is stored in this very format does not know what it was made from.
        if source is None or source.read_parts(name, weight.format) is not None:
            return None
        return source.read(name)

    def report(self) -> dict[str, Any]:
        """Returns what became of the weights.

        Returns:
          ``format``; ``weights``, with the ``name`` of each and its measures; ``all``, the measures
          of all of them taken as one. Of the measures ``error`` is ‖Q − M‖ / ‖M‖; ``base_error``
          that of the quantized base alone, ‖W_q − W‖ / ‖W‖, or None where W is not known; ``edit``
          is ‖Δ‖ / ‖W_q‖; ``kept`` is ⟨Q − W_q, Δ⟩ / ‖Δ‖²: how much of the edit is left along its
          own direction, 1 for all of it and 0 for nothing.
        """
        zero = Squares(*(0.0,) * len(Squares._fields))
        everything = Squares(*map(sum, zip(zero, *self._rows.values(), strict=True)))
        return {
            "format": self._format,
            "weights": [{"name": name} | one.measures() for name, one in self._rows.items()],
            "all": everything.measures(),
        }


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
