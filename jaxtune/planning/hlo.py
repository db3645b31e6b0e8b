"""Parsing compiled programs: their instructions, and how often each one runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

# A computation is "[ENTRY] %name (parameters) -> type {", and an instruction
# "%name = type opcode(operands), attributes"; attributes name the computations that it calls.
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_OPCODE = re.compile(r"(?<=[\s)}\]]) ?([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "tf32": 32}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
      opcode: such as "all-gather".
      result: type of its result as text, such as "bf16[8,128]{1,0}" or a tuple of these.
      rest: operands and attributes, as text.
      computation: the loop body, or the entry computation, that contains it.
      fused: names of the computations on the call path from there.
    """

    opcode: str
    result: str
    rest: str
    computation: str
    fused: tuple[str, ...]

    @property
    def arrays(self) -> list[tuple[str, int]]:
        """The result's arrays: (dtype, bytes)."""
        return [(dtype, nbytes(dtype, dims)) for dtype, dims in _ARRAY.findall(self.result)]


def nbytes(dtype: str, dims: str) -> int:
    """Returns the bytes of an array with dimensions such as "4,128", without padding."""
    bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*$", r"\1", dtype) or 8)
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8


class Program:
    """The text of a compiled module, split into computations."""

    def __init__(self, text: str):
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if header := _HEADER.match(line):
                lines = self.computations.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif " = " in line:
                lines.append(line.strip())

    def executed(self) -> Iterator[tuple[Instruction, float]]:
        """Yields each instruction with its number of runs.

        A loop whose trips depend on the data counts once; of branches only the longest counts.
        """
        yield from self._walk(self.entry, self.entry, (), 1.0)

    def _walk(
        self, name: str, loop: str, fused: tuple[str, ...], times: float
    ) -> Iterator[tuple[Instruction, float]]:
        for line in self.computations.get(name, ()):
            instruction = _parse(line, loop, fused)
            if instruction is None:
                continue
            yield instruction, times
            opcode, rest = instruction.opcode, instruction.rest
            if opcode == "while":
                body = _named(r"body=%?([\w.\-]+)", rest)
                yield from self._walk(body, body, (), times * (self._trips(rest) or 1))
            elif opcode == "conditional":
                groups = _BRANCHES.findall(rest)
                names = [n.strip(" %") for some, one in groups for n in (some or one).split(",")]
                longest = max(names, key=lambda n: len(self.computations.get(n, ())), default="")
                yield from self._walk(longest, loop, fused, times)
            elif not opcode.endswith(("-done", "-update")):
                for called in _CALLED.findall(rest):
                    yield from self._walk(called, loop, (*fused, called), times)

    def _trips(self, rest: str) -> int | None:
        """Returns the trips of a loop that counts from 0, or None for another loop."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', rest):
            return int(known[1])
        condition = self.computations.get(_named(r"condition=%?([\w.\-]+)", rest), [])
        constants = {
            match[1]: int(match[2])
            for line in condition
            if (match := re.match(r"(?:ROOT )?%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", line))
        }
        for line in condition:
            if line.startswith("ROOT") and "direction=LT" in line and " compare(" in line:
                operands = line.split(" compare(", 1)[1].split(")")[0]
                last = operands.split(",")[-1].split("%")[-1].strip()
                return constants.get(last)
        return None


def _named(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _parse(line: str, loop: str, fused: tuple[str, ...]) -> Instruction | None:
    after = line.split(" = ", 1)[1]
    opcode = _OPCODE.search(after)
    if opcode is None:
        return None
    return Instruction(opcode[1], after[: opcode.start()], after[opcode.end() :], loop, fused)
