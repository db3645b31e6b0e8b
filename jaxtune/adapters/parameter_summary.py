"""Summary of a model's parameters: trained and frozen, by module, with counts and bytes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtune.adapters.targets import module_names
from jaxtune.layers.tree import Path, layer_names
from jaxtune.models.definition import Definition


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """One group of arrays.

    Attributes:
      group: module name without layer numbers.
      kind: "trained" or "frozen".
      modules: number of the checkpoint's modules in the group.
      parameters: number of values in them, without padding.
      bytes: size in memory, padding included.
      format: dtype or weight format.
    """

    group: str
    kind: str
    modules: int
    parameters: int
    bytes: int
    format: str


def parameter_summary(definition: Definition) -> list[ParameterGroup]:
    """Returns the parameter groups of a model, trained groups first.

    Stacked arrays may be padded (lower ranks, fewer trained experts) and may hold layers that the
    method leaves alone. Counts leave these out; bytes include them.
    """
    rows: dict[tuple[str, str, str], ParameterGroup] = {}
    modules: dict[tuple[str, str, str], set[str]] = {}
    adapters: dict[Path, Any] = {
        (*path, "adapter"): linear.adapter
        for path, linear in definition.projections().items()
        if linear.adapter is not None
    }
    replaced = {
        path: [
            name for name, here in zip(module_names(path, m), m.chosen.mask, strict=True) if here
        ]
        for path, m in definition.projections().items()
        if m.chosen is not None
    }
    for path, leaf in definition.leaves.items():
        if leaf.kind == "constants":
            continue
        declaration = leaf.declaration
        count = math.prod(declaration.stacked_shape)
        names = layer_names(path[:-1], declaration)
        adapter = adapters.get(path[:-1])
        if path[-2] == "chosen":  # layers with fewer trained experts are padded
            names = replaced[path[:-2]]
            count = len(names) * math.prod(declaration.shape[1:])
        elif path[:-1] in replaced:  # their frozen values take memory but are not parameters
            others = set(names) - set(replaced[path[:-1]])
            count, names = count // len(names) * len(others), sorted(others)
        if adapter is not None:  # layers may have a lower rank, or no adapter at all
            kept = [None if s is None else adapter.parts(s)[path[-1]] for s in adapter.settings]
            count = sum(math.prod(part.shape) for part in kept if part)
            names = [name for name, part in zip(names, kept, strict=True) if part]
        skipped = ("model", "layers", "adapter", "chosen")
        group = ".".join(part for part in path[:-1] if not part.isdigit() and part not in skipped)
        kind = "trained" if leaf.kind == "trainable" else "frozen"
        key = (kind, group, leaf.stored_as)
        row = rows.get(key, ParameterGroup(group, kind, 0, 0, 0, leaf.stored_as))
        modules.setdefault(key, set()).update(names)
        rows[key] = dataclasses.replace(
            row,
            modules=len(modules[key]),
            parameters=row.parameters + count,
            bytes=row.bytes + leaf.nbytes,
        )
    return sorted(rows.values(), key=lambda row: (row.kind != "trained", row.group))


def trained_share(rows: list[ParameterGroup]) -> tuple[int, int, float]:
    """Returns (trained parameters, all parameters, their ratio)."""
    trained = sum(row.parameters for row in rows if row.kind == "trained")
    total = sum(row.parameters for row in rows)
    return trained, total, trained / total


def render(rows: list[ParameterGroup]) -> str:
    """Renders a summary as a text table: one row per trained group and per format of the base."""
    trained, total, share = trained_share(rows)
    lines = [f"{'trained':<36}{'modules':>8}{'parameters':>14}{'share':>9}{'MiB':>9}  format"]
    for row in rows:
        if row.kind == "trained":
            lines.append(
                _line(row.group, row.modules, row.parameters, total, row.bytes, row.format)
            )
    frozen = [row for row in rows if row.kind == "frozen"]
    for fmt in sorted({row.format for row in frozen}):
        group = [row for row in frozen if row.format == fmt]
        modules, count, size = (
            sum(getattr(r, a) for r in group) for a in ("modules", "parameters", "bytes")
        )
        lines.append(_line("(frozen base)", modules, count, total, size, fmt))
    lines.append(f"trains {trained:,} of {total:,} parameters ({share:.3%})")
    return "\n".join(lines)


def _line(group: str, modules: int, count: int, total: int, size: int, fmt: str) -> str:
    return f"{group:<36}{modules:>8}{count:>14,}{count / total:>9.3%}{size / 2**20:>9.1f}  {fmt}"
