"""`jaxtune plan`: memory, operations and time of a training step before anything is loaded.

The very step that a run trains with is compiled for hardware that need not be there; its memory and
its collectives are read off the compiler. Where there is no compiler, memory is estimated.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.checkpoints import huggingface
from jaxtune.config import Config, resolve
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import check_experts, undivided
from jaxtune.parallel.mesh import mesh_shape
from jaxtune.parallel.rules import MESH_AXES
from jaxtune.planning import estimate, roofline
from jaxtune.planning.arguments import base_formats, by_kind, bytes_per_device, step_arguments
from jaxtune.planning.collectives import Collective, collectives
from jaxtune.planning.collectives import by_kind as collectives_by_kind
from jaxtune.planning.flops import StepFlops, step_flops
from jaxtune.planning.topology import Topology, describe
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.train import choose_method

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training step takes of each device, in bytes, and how long it takes.

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
      flops: operations of an update over all devices.
      sent: the collectives of an update; None where the step was not compiled to the end.
      time: of an update; None for hardware of unknown speed, or where `sent` is not known.
      estimated: whether memory beside the arguments is a formula's and not the compiler's.
      notes: what a reader has to know, a line each.
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
    time: roofline.Estimate | None = None
    estimated: bool = False
    notes: tuple[str, ...] = ()

    @property
    def resident(self) -> int:
        """Bytes of one device between steps."""
        return sum(self.arguments.values())

    @property
    def passing(self) -> int:
        """Bytes that one device needs besides at the peak of a step."""
        return self.outputs + self.temporaries + self.program

    @property
    def total(self) -> int:
        """Bytes of one device at the peak of a step."""
        return self.resident + self.passing

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
                "arguments": self.resident,
                "temporaries": self.passing,
                "total": self.total,
            },
            "capacity_bytes": self.capacity,
            "fits": self.fits,
            "flops_per_token": round(self.flops.model / self.flops.tokens),
            "hardware_flops_per_token": round(self.flops.hardware / self.flops.tokens),
            "tokens_per_step": self.flops.tokens,
            "collectives": None if self.sent is None else collectives_by_kind(self.sent),
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
        return json.dumps(content, indent=2) + "\n"

    def render(self) -> str:
        """Renders the plan as tables of text."""
        from jaxtune.planning.report import render

        return render(self)


def plan(config: Config, topology: str) -> Plan:
    """Plans the training step of a run on described hardware; no weight is read.

    Args:
      config: resolved; of the model only config.json is needed.
      topology: see `jaxtune.planning.topology.describe`.

    Raises:
      JaxtuneError: an unknown topology, or a setting that cannot be met.
    """
    hardware = describe(topology)
    method, _ = choose_method(config)
    model = model_config(config)
    if hardware.devices is None:
        return _estimated(config, model, method, hardware)
    return compile_plan(set_up(config, model, method, hardware.devices), hardware)


def model_config(config: Config) -> dict[str, Any]:
    """Returns the content of the model's config.json, which may lie there without weights."""
    path, revision = config.model.path, config.model.revision
    location = huggingface.resolve_path(path, revision, files=("config.json",))
    if location.is_dir():
        return huggingface.read_config(location)
    return huggingface.open_source(location).config


def compile_plan(setup: Setup, hardware: Topology) -> Plan:
    """Compiles the training step of `setup` and reads its memory off the compiler."""
    arguments = step_arguments(setup)
    kinds = {kind: bytes_per_device(tree) for kind, tree in by_kind(arguments).items()}
    flops, found = step_flops(setup), None
    notes = [hardware.note, *undivided(setup.definition, setup.mesh.shape)]
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        lowered = setup.train_step().lower(*arguments)
        try:
            compiled = lowered.compile()
            memory = compiled.memory_analysis()
            resident, outputs, temporaries, program = (
                memory.argument_size_in_bytes,
                memory.output_size_in_bytes - memory.alias_size_in_bytes,
                memory.temp_size_in_bytes,
                memory.generated_code_size_in_bytes,
            )
            found = collectives(compiled.as_text(), hardware.count)
        except jax.errors.JaxRuntimeError as error:
            resident, outputs, program = sum(kinds.values()), 0, 0
            temporaries = _bytes_needed(error) - resident
            notes.append("the compiler gave up for want of memory: collectives are not known")
    mesh = dict(setup.mesh.shape)
    return Plan(
        topology=hardware.name,
        devices=hardware.count,
        mesh=mesh,
        attention=setup.options.attention,
        base_formats=base_formats(arguments[1]),
        arguments={**kinds, "layout": resident - sum(kinds.values())},
        outputs=outputs,
        temporaries=temporaries,
        program=program,
        capacity=hardware.capacity_bytes,
        compile_seconds=time.perf_counter() - start,
        flops=flops,
        sent=found,
        time=_time(hardware, flops, mesh, found),
        notes=tuple(note for note in notes if note),
    )


def _time(
    hardware: Topology, flops: StepFlops, mesh: Mapping[str, int], found: list[Collective] | None
) -> roofline.Estimate | None:
    if hardware.chip is None or found is None:
        return None
    sent = sum(each.times * each.sent for each in found)
    return roofline.estimate(hardware.chip, flops, mesh, sent)


def _estimated(config: Config, model: Mapping[str, Any], method: Any, hardware: Topology) -> Plan:
    """Plans without a compiler: the arguments exactly, the rest by formula."""
    sizes = mesh_shape(config.mesh.to_dict(), hardware.count)
    mesh: dict[str, int] = dict(zip(MESH_AXES, sizes, strict=True))
    alone = resolve({**config.to_dict(), "mesh": dict.fromkeys(MESH_AXES, 1)})
    setup = set_up(alone, model, method, jax.devices("cpu")[:1])
    check_experts(setup.definition, mesh)
    options = setup.options._replace(attention="cudnn", platform="gpu")
    setup = dataclasses.replace(setup, options=options)
    arguments, flops = step_arguments(setup), step_flops(setup)
    found: list[Collective] | None = [] if hardware.count == 1 else None
    notes = [hardware.note, "an estimate by formula, not the compiler's count"]
    notes += undivided(setup.definition, mesh)
    if found is None:
        notes.append("collectives and time are known only to a compiler")
    return Plan(
        topology=hardware.name,
        devices=hardware.count,
        mesh=mesh,
        attention=options.attention,
        base_formats=base_formats(arguments[1], mesh),
        arguments={kind: bytes_per_device(tree, mesh) for kind, tree in by_kind(arguments).items()},
        outputs=0,
        temporaries=estimate.temporaries(setup, mesh),
        program=0,
        capacity=hardware.capacity_bytes,
        compile_seconds=0.0,
        flops=flops,
        sent=found,
        time=_time(hardware, flops, mesh, found),
        estimated=True,
        notes=tuple(note for note in notes if note),
    )


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


__all__ = ["Plan", "compile_plan", "model_config", "plan", "step_arguments"]
