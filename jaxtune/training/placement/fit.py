"""Fits the config of a run to its devices: sizes of the mesh, number of micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from jax.sharding import Mesh

from jaxtune.config import Config
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.models.definition import Definition
from jaxtune.parallel.devices import DeviceGroup
from jaxtune.parallel.mesh import fit_mesh
from jaxtune.parallel.rules import MESH_AXES, RULES
from jaxtune.training.placement.memory import bytes_per_device, temporaries
from jaxtune.training.placement.split import BatchSplit, fewest_micro_batches

# Share of the allocator's memory that derived micro-batches may fill by the estimate, because
# formulas are less exact than a compiler (docs/planning.md).
_USABLE = 0.9


class FittedConfig(NamedTuple):
    """A config with the sizes of its mesh, all of them positive.

    Attributes:
      config: the config; ``training.accumulation`` may still be 0.
      notes: remarks for the log, one line each.
    """

    config: Config
    notes: list[str]


def fit_to_devices(config: Config, definition: Definition, devices: DeviceGroup) -> FittedConfig:
    """Fits the mesh of a config to devices.

    A config that was fitted to as many devices of the same type is returned as it is, so that a
    resumed run repeats its derived values. Otherwise the values that were requested are fitted
    anew.

    Args:
      config: resolved config.
      definition: definition of the model.
      devices: devices of the run.

    Raises:
      JaxtuneError: the sizes on the command line do not fit; the message names the nearest ones.
    """
    before = config.derived
    if before is not None and (before.devices, before.kind) == (devices.count, devices.kind):
        return FittedConfig(config, [])
    config = config.requested()
    sizes, changes = fit_mesh(
        config.mesh.to_dict(),
        devices.count,
        fixed=[axis for axis in MESH_AXES if f"mesh.{axis}" in config.overridden],
        experts=routed_experts(definition),
        length=config.data.max_length + definition.reserved,
    )
    notes = []
    if before is not None:
        notes.append(
            f"the run was fitted to {before.devices} × {before.kind} and continues on "
            f"{devices.count} × {devices.kind}"
        )
    if changes:
        fitted = (f"mesh.{axis}: {old} → {new}" for axis, (old, new) in changes.items())
        notes.append(f"fitted to {devices.count} device(s): {', '.join(fitted)}")
    return FittedConfig(config.with_derived(devices.count, devices.kind, mesh=sizes), notes)


def with_accumulation(
    config: Config,
    definition: Definition,
    options: ForwardOptions,
    devices: DeviceGroup,
    device_mesh: Mesh,
    resident: int,
    trainable: int,
) -> Config:
    """Derives ``training.accumulation`` if it is 0, the fewest micro-batches that fit.

    Args:
      config: config with the sizes of the mesh.
      definition: definition of the model.
      options: options of the forward pass.
      devices: devices of the run.
      device_mesh: mesh with these sizes.
      resident: bytes per device of the arrays that stay between steps.
      trainable: bytes per device of the trainable tree, a part of them.
    """
    training, mesh = config.training, config.mesh.to_dict()
    if training.accumulation:
        return config
    length = (config.data.max_length + definition.reserved) // mesh["sequence"]
    usable = devices.memory * _USABLE - resident
    usable -= _copies(definition, device_mesh)

    def fits(rows: int) -> bool:
        return temporaries(definition, options, mesh, rows * length, trainable) <= usable

    count = fewest_micro_batches(training.batch_size, batch_shares(mesh), fits)
    derived = {"accumulation": count}
    return config.with_derived(devices.count, devices.kind, training=derived)


def _copies(definition: Definition, mesh: Mesh) -> int:
    """Returns the bytes per device of two copies of the largest stack of plain frozen weights.

    XLA copies up to two stacks to another layout, which depends on the number of rows in a way that
    only the compilation shows, and does so even if the step does not fit then.
    """
    stacks = [
        bytes_per_device(leaf.abstract(mesh))
        for leaf in definition.of_kind("base").values()
        if leaf.format is None and leaf.declaration.stack_shape and len(leaf.declaration.shape) > 1
    ]
    return 2 * max(stacks, default=0)


def split_of(config: Config) -> BatchSplit:
    """Returns the split of a training batch of a fitted config."""
    training = config.training
    return BatchSplit(
        training.batch_size, batch_shares(config.mesh.to_dict()), training.accumulation
    )


def batch_shares(mesh: Mapping[str, int]) -> int:
    """Returns the number of devices that split a batch."""
    return math.prod(mesh[axis] for axis in RULES["batch"])


def routed_experts(definition: Definition) -> int:
    """Returns the number of routed experts of a layer; 0 if there are none.

    Of layers with different numbers it is the greatest common divisor, which a mesh must divide.
    """
    return math.gcd(*(leaf.declaration.experts or 0 for leaf in definition.leaves.values()))
