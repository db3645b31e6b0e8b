"""`jaxtune plan`: the memory of a training step, from the compiler, before anything is loaded."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from jaxtune.checkpoints import huggingface
from jaxtune.errors import JaxtuneError
from jaxtune.layers.bits import as_bits
from jaxtune.planning.topology import GIB, Topology, describe
from jaxtune.quant import QuantizedWeight
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.train import choose_method

_PLAIN = {"bfloat16", "float16", "float32"}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes of each device, in bytes.

    Attributes:
      topology: the hardware, as asked for.
      devices: how many.
      mesh: devices along each mesh axis.
      attention: backend of the attention.
      base_formats: bytes of the frozen base by the format that they are stored in; together they
        are the base among the arguments.
      arguments: what is resident between steps, by kind: base, trainable, optimizer, constants,
        batch, and layout (what the compiler's tiling of these arrays adds).
      outputs: results that do not take the place of an argument.
      temporaries: the most that the step needs besides, at one time.
      program: the compiled code.
      capacity: what a device has.
      compile_seconds: how long the compiler took.
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

    @property
    def total(self) -> int:
        """Bytes of one device at the peak of a step."""
        return sum(self.arguments.values()) + self.outputs + self.temporaries + self.program

    @property
    def fits(self) -> bool:
        """Whether a device has as much."""
        return self.total <= self.capacity

    def to_json(self) -> str:
        """Renders the plan as JSON; every size is in bytes and of one device."""
        content = {
            "topology": self.topology,
            "devices": self.devices,
            "mesh": dict(self.mesh),
            "attention": self.attention,
            "per_device_bytes": {
                "arguments": dict(self.arguments),
                "base_formats": dict(self.base_formats),
                "outputs": self.outputs,
                "temporaries": self.temporaries,
                "program": self.program,
                "total": self.total,
            },
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "compile_seconds": round(self.compile_seconds, 2),
        }
        return json.dumps(content, indent=2) + "\n"

    def render(self) -> str:
        """Renders the plan as a table of text."""
        table = Table("of each device", title=f"{self.topology}, {self._mesh_text()}")
        table.add_column("GiB", justify="right")
        table.add_column("bytes", justify="right")
        rows: dict[str, int] = {}
        for kind, size in self.arguments.items():
            formats = self.base_formats if kind == "base" else {}
            rows |= {f"base, {name}": part for name, part in formats.items()} or {kind: size}
        rows |= {
            "outputs": self.outputs,
            "temporaries": self.temporaries,
            "program": self.program,
        }
        for kind, size in rows.items():
            table.add_row(kind, f"{size / GIB:.3f}", f"{size:,}")
        table.add_section()
        table.add_row("total", f"{self.total / GIB:.3f}", f"{self.total:,}")
        table.add_row("available", f"{self.capacity / GIB:.3f}", f"{self.capacity:,}")
        text = io.StringIO()
        Console(file=text, width=80).print(table)
        return text.getvalue() + self._verdict()

    def _mesh_text(self) -> str:
        split = [f"{axis}={size}" for axis, size in self.mesh.items() if size > 1]
        return f"{self.devices} device(s){': ' if split else ''}{', '.join(split)}"

    def _verdict(self) -> str:
        if self.fits:
            return f"fits, with {(self.capacity - self.total) / GIB:.2f} GiB to spare\n"
        plain = self.arguments["base"] > 0 and set(self.base_formats) <= _PLAIN
        quantize = "quantize.format=nf4 (a 4-bit base), " if plain else ""
        return (
            f"does not fit: {(self.total - self.capacity) / GIB:.2f} GiB too much. Less memory: "
            f'{quantize}a higher training.accumulation, training.remat="full", a lower '
            "data.max_length, or more devices along mesh.fsdp\n"
        )


def plan(config: Any, topology: str) -> Plan:
    """Compiles the training step of a run for described hardware; no weight is read.

    Args:
      config: resolved; of the model only config.json is needed.
      topology: see `jaxtune.planning.topology.describe`.

    Raises:
      JaxtuneError: an unknown topology, or a setting that cannot be met.
    """
    hardware = describe(topology)
    method, _ = choose_method(config)
    setup = set_up(config, model_config(config), method, hardware.devices)
    return compile_plan(setup, hardware)


def model_config(config: Any) -> dict[str, Any]:
    """Returns the content of the model's config.json, which may lie there without weights."""
    path, revision = config.model.path, config.model.revision
    location = huggingface.resolve_path(path, revision, files=("config.json",))
    if location.is_dir():
        return huggingface.read_json(location / "config.json")
    return huggingface.open_source(location).config


def compile_plan(setup: Setup, hardware: Topology) -> Plan:
    """Compiles the training step of `setup` and reads its memory off the compiler."""
    arguments = step_arguments(setup)
    kinds = {kind: _bytes_per_device(tree) for kind, tree in _by_kind(arguments).items()}
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        lowered = setup.train_step().lower(*arguments)
        try:
            memory = lowered.compile().memory_analysis()
            resident, outputs, temporaries, program = (
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes - memory.alias_size_in_bytes,
                memory.temp_size_in_bytes,
                memory.generated_code_size_in_bytes,
            )
        except jax.errors.JaxRuntimeError as error:
            resident, outputs, program = sum(kinds.values()), 0, 0
            temporaries = _bytes_needed(error) - resident
    return Plan(
        topology=hardware.name,
        devices=len(hardware.devices),
        mesh=dict(setup.mesh.shape),
        attention=setup.options.attention,
        base_formats=_base_formats(arguments[1]),
        arguments={**kinds, "layout": resident - sum(kinds.values())},
        outputs=outputs,
        temporaries=temporaries,
        program=program,
        capacity=hardware.capacity_bytes,
        compile_seconds=time.perf_counter() - start,
    )


def step_arguments(setup: Setup) -> tuple[Any, Any, Any, Any]:
    """Describes what a run gives to its training step: (state, base, constants, batch)."""
    definition, mesh = setup.definition, setup.mesh
    return (
        setup.like,
        as_bits(definition.abstract("base", mesh), setup.options.platform),
        definition.abstract("constants", mesh),
        setup.batch_like(),
    )


def _by_kind(arguments: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    state, base, constants, batch = arguments
    return {
        "base": base,
        "trainable": state.trainable,
        "optimizer": (state.opt_state, state.step, state.guard),
        "constants": constants,
        "batch": batch,
    }


def _base_formats(base: Any) -> dict[str, int]:
    """Returns the bytes per device of a base by format, the largest first."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(base, is_leaf=lambda x: isinstance(x, QuantizedWeight)):
        quantized = isinstance(leaf, QuantizedWeight)
        # A CPU's step takes bfloat16 as its bits.
        dtype = "bfloat16" if not quantized and leaf.dtype == jnp.uint16 else None
        name = leaf.format.name if quantized else dtype or str(leaf.dtype)
        sizes[name] = sizes.get(name, 0) + _bytes_per_device(leaf)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _bytes_per_device(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard = jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        total += shard.size * shard.dtype.itemsize
    return total


def _bytes_needed(error: Exception) -> int:
    """Reads how much a program needs off the compiler's refusal to compile it.

    Raises:
      JaxtuneError: the compiler failed for another reason.
    """
    text = str(error)
    sizes = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMGT])", text)
    if "RESOURCE_EXHAUSTED" not in text or sizes is None:
        raise JaxtuneError(f"the compiler failed: {text.splitlines()[0]}") from error
    return int(float(sizes[1]) * _UNITS[sizes[2]])
