"""`jaxtune plan`: memory, operations and time of a training step before anything is loaded.

The training step itself is compiled for a described topology, without its hardware; memory and
collectives come from the compiler. Without a compiler for the hardware, memory is estimated.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.checkpoints import huggingface
from jaxtune.config import Config, ModelConfig
from jaxtune.errors import JaxtuneError
from jaxtune.memory_errors import is_out_of_memory, read_shortage
from jaxtune.models.definition import undivided
from jaxtune.planning import roofline
from jaxtune.planning.arguments import base_formats, by_kind, step_arguments
from jaxtune.planning.collectives import Collective, collectives
from jaxtune.planning.flops import StepFlops, step_flops
from jaxtune.planning.report import Plan
from jaxtune.planning.topology import Topology, find_topology
from jaxtune.planning.traffic import estimated_collectives
from jaxtune.training.placement.memory import bytes_per_device
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.train import choose_method


def plan(config: Config, topology: str) -> Plan:
    """Plans the training step of a run for a topology; no weight is read.

    Args:
      config: a resolved config; the model's directory needs only config.json.
      topology: name of the hardware; see `jaxtune.planning.topology.find_topology`.

    Raises:
      JaxtuneError: an unknown topology, or a setting that cannot be met.
    """
    return plan_for(config, find_topology(topology))


def plan_for(config: Config, hardware: Topology) -> Plan:
    """Plans the training step of a run for described hardware; see `plan`."""
    method, _ = choose_method(config.adapter)
    setup = set_up(config, model_config(config.model), method, hardware.group)
    if hardware.devices is None:
        return _estimated(setup, hardware)
    return compile_plan(setup, hardware)


def model_config(model: ModelConfig) -> dict[str, Any]:
    """Returns the content of the model's config.json; weights are not needed."""
    location = huggingface.resolve_path(model.path, model.revision, files=("config.json",))
    if location.is_dir():
        return huggingface.read_config(location)
    return huggingface.open_source(location).config


def compile_plan(setup: Setup, hardware: Topology) -> Plan:
    """Compiles the training step of `setup`; memory and collectives are the compiler's."""
    arguments = step_arguments(setup)
    kinds = {kind: bytes_per_device(tree) for kind, tree in by_kind(arguments).items()}
    flops, found = step_flops(setup), None
    notes = [hardware.note, *setup_notes(setup)]
    start = time.perf_counter()
    with jax.set_mesh(setup.mesh):
        lowered = setup.train_step().lower(*arguments)
        try:
            compiled = lowered.compile()
            memory = compiled.memory_analysis()
            # Donated arguments (the state) share memory with outputs, which counts as an alias.
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
            notes.append("the compiler ran out of device memory: collectives are not known")
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


def setup_notes(setup: Setup) -> list[str]:
    """Returns what `train` logs about the split over the devices, a line each."""
    split = setup.split
    batch = f"{split.accumulation} micro-batch(es) of {split.micro_rows} row(s)"
    warning = [split.warning()] if split.warning() else []
    return [batch, *setup.notes, *warning, *undivided(setup.definition, setup.mesh.shape)]


def _estimated(setup: Setup, hardware: Topology) -> Plan:
    """Plans without a compiler: arguments are exact, everything else is estimated by formulas."""
    setup = dataclasses.replace(setup, options=setup.options._replace(attention="cudnn"))
    arguments, flops = step_arguments(setup), step_flops(setup)
    kinds = {kind: bytes_per_device(tree) for kind, tree in by_kind(arguments).items()}
    mesh, found = dict(setup.mesh.shape), estimated_collectives(setup)
    notes = [hardware.note, "estimated by formulas; not compiled", *setup_notes(setup)]
    return Plan(
        topology=hardware.name,
        devices=hardware.count,
        mesh=mesh,
        attention=setup.options.attention,
        base_formats=base_formats(arguments[1]),
        arguments=kinds,
        outputs=0,
        temporaries=setup.temporaries(),
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
    """Returns the bytes that a program needs, from the compiler's out-of-memory error.

    Raises:
      JaxtuneError: the compiler failed for another reason.
    """
    needed = read_shortage(str(error)).program
    if not is_out_of_memory(error) or needed is None:
        raise JaxtuneError(f"the compiler failed: {str(error).splitlines()[0]}") from error
    return needed


__all__ = ["Plan", "compile_plan", "model_config", "plan", "step_arguments"]
