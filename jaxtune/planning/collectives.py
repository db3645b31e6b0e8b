"""The collectives of a compiled step: their kinds, sizes and number."""

from __future__ import annotations

import dataclasses
import math
import re

from jaxtune.planning.hlo import Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_START = "AsyncCollectiveStart"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a step.

    Attributes:
      kind: one of `KINDS`.
      dtype: dtype of its largest array in the compiler's notation: "bf16", "u8".
      times: number of runs in a step.
      sent: bytes that each device sends per run, with a ring algorithm.
      group: number of participating devices.
    """

    kind: str
    dtype: str
    times: float
    sent: int
    group: int


def collectives(text: str, devices: int) -> list[Collective]:
    """Lists the collectives of a compiled step.

    Args:
      text: the compiled module as text.
      devices: number of devices for which it is compiled.
    """
    program = Program(text)
    alone: list[Collective] = []
    fused: dict[tuple[str, ...], dict[str, tuple[bool, Collective]]] = {}
    for instruction, times in program.executed():
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        measured = _measured(instruction, kind, times, devices)
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if channel is None or not instruction.fused:
            alone.append(measured)
            continue
        # A TPU runs one collective as a chain of fusions with the same channel number. Parts of the
        # chain may lie before, in and after a loop whose computation hides them. It is counted once
        # per run of the computation that starts it.
        chain = re.search(r'chain_id="(\d+)"', instruction.rest)
        starts = any(_START in line for line in program.computations[instruction.fused[-1]])
        parts = fused.setdefault((kind, channel[1], chain[1] if chain else ""), {})
        if starts or instruction.computation not in parts:
            parts[instruction.computation] = starts, measured
    for parts in fused.values():
        started = [measured for starts, measured in parts.values() if starts]
        alone += started or [measured for _, measured in parts.values()]
    return [collective for collective in alone if collective.sent]


def totals_by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Returns, for each kind of collective, its runs and the bytes sent per step and device."""
    table: dict[str, dict[str, int]] = {}
    for each in found:
        row = table.setdefault(each.kind, {"count": 0, "bytes": 0})
        row["count"] += round(each.times)
        row["bytes"] += round(each.times * each.sent)
    return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))


def _measured(instruction: Instruction, kind: str, times: float, devices: int) -> Collective:
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, perhaps a context of scalars)
        arrays = [array for array in arrays if array[1] > 4] or arrays
        arrays = arrays[len(arrays) // 2 :]
    size, group = sum(array[1] for array in arrays), _group(instruction.rest, devices)
    if kind == "all-reduce" and any("all-reduce-scatter" in name for name in instruction.fused):
        kind, size = "reduce-scatter", size // group
    # A ring passes the shards around: each device sends (group - 1) of them. `size` is that of the
    # result, which is all shards for a gather and one for a scatter; an all-reduce is a scatter and
    # a gather.
    others = group - 1
    sent = {
        "all-gather": size * others / group,
        "all-reduce": 2 * size * others / group,
        "reduce-scatter": size * others,
        "all-to-all": size * others / group,
        "ragged-all-to-all": size * others / group,
    }.get(kind, size)
    dtype = max(arrays, key=lambda array: array[1])[0] if arrays else ""
    return Collective(kind, dtype, times, round(sent), group)


def _group(rest: str, devices: int) -> int:
    """Returns the number of participating devices; XLA writes groups in three ways."""
    if "source_target_pairs" in rest:
        return 2
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']+)'", match[2]))
    return devices
