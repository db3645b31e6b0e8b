"""The meshes on which finished runs and checkpoints are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.adapters.define import define
from jaxtune.config import Config
from jaxtune.models.definition import Definition
from jaxtune.parallel.devices import DeviceGroup
from jaxtune.parallel.mesh import make_mesh, single_device_mesh
from jaxtune.parallel.rules import MESH_AXES
from jaxtune.training.placement.fit import fit_to_devices

# Share of the memory of JAX's allocator that weights may take, so that the key-value cache fits as
# well.
WEIGHTS_SHARE = 0.8


def run_mesh(config: Config, model_config: Mapping[str, Any]) -> Mesh:
    """Returns the mesh on which the model of a run is loaded: the run's, fitted to the devices.

    A process that is alone loads onto one device if the mesh splits no weight, but only the batch.

    Args:
      config: config of the run.
      model_config: content of the model's config.json.
    """
    devices = jax.devices()
    definition = define(model_config, config.training.dtype)
    sizes = fit_to_devices(config, definition, DeviceGroup.of(devices)).config.mesh.to_dict()
    if jax.process_count() == 1 and sizes["data"] == len(devices):
        return single_device_mesh()
    return make_mesh(sizes)


def loading_mesh(definition: Definition) -> Mesh:
    """Returns the mesh on which a checkpoint is loaded: one device, if the weights fit on it.

    They fit if they take at most `WEIGHTS_SHARE` of the memory that JAX's allocator takes by
    default of a device of this type. Otherwise, and with several processes, all devices split them
    along ``fsdp``.

    Args:
      definition: definition of the model.
    """
    devices = jax.devices()
    size = sum(leaf.nbytes for leaf in definition.in_checkpoint().values())
    fits = size <= WEIGHTS_SHARE * DeviceGroup.of(devices).memory
    if len(devices) == 1 or (fits and jax.process_count() == 1):
        return single_device_mesh()
    return make_mesh(dict.fromkeys(MESH_AXES, 1) | {"fsdp": len(devices)})
