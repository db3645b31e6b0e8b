"""A plan: its numbers, as JSON and as text."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtune.parallel.devices import GIB, GPUS, TPUS
from jaxtune.planning.collectives import Collective, totals_by_kind
from jaxtune.planning.flops import StepFlops
from jaxtune.planning.roofline import Estimate, assumptions

_PLAIN = {"bfloat16", "float32"}
_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Plan:
    """Memory, operations and time of a training step. Sizes are bytes of one device.

    Attributes:
      topology: name of the hardware.
      devices: number of devices.
      mesh: devices along each mesh axis.
      attention: backend of the attention.
      base_formats: size of the frozen base by storage format; the sum is the base in `arguments`.
      arguments: size of the arrays that stay between steps, by kind: base, trainable, optimizer,
        constants, batch, and layout (padding by the compiler's tiling).
      outputs: size of the results that do not reuse an argument's memory.
      temporaries: peak size of intermediate arrays.
      program: size of the compiled code.
      capacity: memory of a device that a program may use.
      compile_seconds: duration of the compilation.
      flops: operations of a step over all devices.
      sent: collectives of a step; None if compilation did not finish.
      time: duration of a step; None for hardware of unknown speed, or without `sent`.
      estimated: whether all but `arguments` comes from formulas instead of the compiler.
      notes: remarks for the reader, one line each.
    """

    topology: str
    devices: int
    mesh: Mapping[str, int]
    attention: str
    base_formats: Mapping[str, int]
    arguments: Mapping[str, int]
    outputs: int
    temporaries: int
    program: int
    capacity: int
    compile_seconds: float
    flops: StepFlops
    sent: list[Collective] | None = None
    time: Estimate | None = None
    estimated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def resident(self) -> int:
        """Memory of a device that is in use between steps."""
        return sum(self.arguments.values())

    @property
    def passing(self) -> int:
        """Additional memory of a device at the peak of a step."""
        return self.outputs + self.temporaries + self.program

    @property
    def total(self) -> int:
        """Memory of a device at the peak of a step."""
        return self.resident + self.passing

    @property
    def fits(self) -> bool:
        """Whether the step fits into the memory of a device."""
        return self.total <= self.capacity

    def to_json(self) -> str:
        """Returns the plan as JSON; see `to_dict`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as values of JSON; sizes are bytes of one device."""
        content = {
            "topology": self.topology,
            "devices": self.devices,
            "mesh": dict(self.mesh),
            "attention": self.attention,
            "per_device_bytes": {
                "arguments": self.resident,
                "temporaries": self.passing,
                "total": self.total,
            },
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "flops_per_token": round(self.flops.model / self.flops.tokens),
            "hardware_flops_per_token": round(self.flops.hardware / self.flops.tokens),
            "tokens_per_step": self.flops.tokens,
            "collectives": None if self.sent is None else totals_by_kind(self.sent),
            "time": None,
            "bytes_by_kind": {
                **self.arguments,
                "outputs": self.outputs,
                "temporaries": self.temporaries,
                "program": self.program,
            },
            "base_formats": dict(self.base_formats),
            "memory": "estimated" if self.estimated else "compiled",
            "notes": list(self.notes),
            "compile_seconds": round(self.compile_seconds, 2),
        }
        if self.time is not None:
            content["time"] = {
                "seconds_per_step": self.time.seconds,
                "tokens_per_second": self.time.tokens_per_second,
                "seconds_at_best": self.time.at_best,
                "bound_by": self.time.bound,
            }
        return content

    def render(self) -> str:
        """Returns the plan as text: tables of memory and collectives, and whether it fits."""
        lines = [_text(_memory(self)).rstrip("\n"), fit_summary(self), "", *_work(self)]
        if self.sent:
            lines.append(_text(_collectives(self)).rstrip("\n"))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)]) + "\n"


def _text(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(table)
    return text.getvalue()


def _memory(plan: Plan) -> Table:
    how = "estimated, not compiled" if plan.estimated else "per device"
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
    """Returns the number of devices of a plan, and their mesh, as text."""
    split = [f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1]
    return f"{plan.devices} device(s){': ' if split else ''}{', '.join(split)}"


def fit_summary(plan: Plan) -> str:
    """Returns whether a plan fits, as text; if not, with the settings that need less memory."""
    if plan.fits:
        return f"fits, with {(plan.capacity - plan.total) / GIB:.2f} GiB to spare"
    plain = plan.arguments["base"] > 0 and set(plan.base_formats) <= _PLAIN
    quantize = "quantize.format=nf4 (a 4-bit base), " if plain else ""
    return (
        f"does not fit: {(plan.total - plan.capacity) / GIB:.2f} GiB too much. To save memory: "
        f'{quantize}a higher training.accumulation, training.remat="full", a lower '
        "data.max_length, or more devices along mesh.fsdp"
    )


def _work(plan: Plan) -> Iterator[str]:
    flops = plan.flops
    yield (
        f"a step: {flops.tokens:,} tokens; per token {flops.model / flops.tokens / 1e9:.2f} "
        f"GFLOP of the model, {flops.hardware / flops.tokens / 1e9:.2f} with recomputation"
    )
    if plan.time is None:
        return
    time, chip = plan.time, (TPUS | GPUS)[plan.topology.partition(":")[0]]
    yield (
        f"about {time.seconds:.3g} s and {time.tokens_per_second:,.0f} tokens/s, bound by "
        f"{time.bound}; {time.at_best:.3g} s at the peak rates"
    )
    yield from (f"  assumed: {line}" for line in assumptions(chip))


def _collectives(plan: Plan) -> Table:
    table = Table(f"sent by each device in a step{', estimated' if plan.estimated else ''}")
    table.add_column("times", justify="right")
    table.add_column("GiB", justify="right")
    for kind, row in totals_by_kind(plan.sent or []).items():
        table.add_row(kind, f"{row['count']:,}", f"{row['bytes'] / GIB:.3f}")
    return table
