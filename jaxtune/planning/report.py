"""A plan as text."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from jaxtune.planning.collectives import by_kind
from jaxtune.planning.devices import GIB, GPUS, TPUS
from jaxtune.planning.plan import Plan
from jaxtune.planning.roofline import assumptions

_PLAIN = {"bfloat16", "float32"}
_WIDTH = 80


def render(plan: Plan) -> str:
    """Renders a plan as tables of text and a verdict."""
    lines = [_text(_memory(plan)).rstrip("\n"), verdict(plan), "", *_work(plan)]
    if plan.sent:
        lines.append(_text(_collectives(plan)).rstrip("\n"))
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)]) + "\n"


def _text(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue()


def _memory(plan: Plan) -> Table:
    how = "estimated, not compiled" if plan.estimated else "of each device"
    table = Table(how, title=f"{plan.topology}, {mesh_text(plan)}")
    table.add_column("GiB", justify="right")
    table.add_column("bytes", justify="right")
    rows: dict[str, int] = {}
    for kind, size in plan.arguments.items():
        formats = plan.base_formats if kind == "base" else {}
        rows |= {f"base, {name}": part for name, part in formats.items()} or {kind: size}
    rows |= {"outputs": plan.outputs, "temporaries": plan.temporaries, "program": plan.program}
    for kind, size in rows.items():
        table.add_row(kind, f"{size / GIB:.3f}", f"{size:,}")
    table.add_section()
    table.add_row("total", f"{plan.total / GIB:.3f}", f"{plan.total:,}")
    table.add_row("available", f"{plan.capacity / GIB:.3f}", f"{plan.capacity:,}")
    return table


def mesh_text(plan: Plan) -> str:
    """Says how many devices a plan is for, and how they are split."""
    split = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
    return f"{plan.devices} device(s){': ' if split else ''}{', '.join(split)}"


def verdict(plan: Plan) -> str:
    """Says whether a plan fits, and what to change where it does not."""
    if plan.fits:
        return f"fits, with {(plan.capacity - plan.total) / GIB:.2f} GiB to spare"
    plain = plan.arguments["base"] > 0 and set(plan.base_formats) <= _PLAIN
    quantize = "quantize.format=nf4 (a 4-bit base), " if plain else ""
    return (
        f"does not fit: {(plan.total - plan.capacity) / GIB:.2f} GiB too much. Less memory: "
        f'{quantize}a higher training.accumulation, training.remat="full", a lower '
        "data.max_length, or more devices along mesh.fsdp"
    )


def _work(plan: Plan) -> Iterator[str]:
    flops = plan.flops
    yield (
        f"an update: {flops.tokens:,} tokens; per token {flops.model / flops.tokens / 1e9:.2f} "
        f"GFLOP of the model, {flops.hardware / flops.tokens / 1e9:.2f} with recomputation"
    )
    if plan.time is None:
        return
    time, chip = plan.time, (TPUS | GPUS)[plan.topology.partition(":")[0]]
    yield (
        f"about {time.seconds:.3g} s and {time.tokens_per_second:,.0f} tokens/s, bound by "
        f"{time.bound}; at best {time.at_best:.3g} s"
    )
    yield from (f"  assumed: {line}" for line in assumptions(chip))


def _collectives(plan: Plan) -> Table:
    table = Table("sent by each device in an update")
    table.add_column("times", justify="right")
    table.add_column("GiB", justify="right")
    for kind, row in by_kind(plan.sent or []).items():
        table.add_row(kind, f"{row['count']:,}", f"{row['bytes'] / GIB:.3f}")
    return table
