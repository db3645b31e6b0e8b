"""The meshes on which finished runs and checkpoints are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.config import Config
from jaxtune.models.definition import Definition
from jaxtune.parallel.mesh import fit_mesh, make_mesh, single_device_mesh
from jaxtune.parallel.rules import MESH_AXES

# Share of a device's memory that weights may take, so that the key-value cache fits as well.
WEIGHTS_SHARE = 0.8


def fitted_to_devices(
    config: Config, model_config: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> Config:
    """Returns the config of a run with its mesh fitted to the devices; see `fit_mesh`.

    Args:
      config: config of the run.
      model_config: content of the model's config.json.
      devices: the devices; all of them by default.
    """
    count = len(jax.devices() if devices is None else devices)
    experts = model_config.get("n_routed_experts") or 0
    return config.replace(mesh=fit_mesh(config.mesh.to_dict(), count, experts=experts).sizes)


def run_mesh(config: Config, model_config: Mapping[str, Any]) -> Mesh:
    """Returns the mesh on which the model of a run is loaded: the run's, fitted to the devices.

    A process that is alone loads onto one device if the mesh splits no weight, but only the batch.

    Args:
      config: config of the run.
      model_config: content of the model's config.json.
    """
    sizes = fitted_to_devices(config, model_config).mesh.to_dict()
    if jax.process_count() == 1 and sizes["data"] == len(jax.devices()):
        return single_device_mesh()
    return make_mesh(sizes)


def loading_mesh(definition: Definition) -> Mesh:
    """Returns the mesh on which a checkpoint is loaded: one device, if the weights fit on it.

    They fit if they take at most `WEIGHTS_SHARE` of the memory that the device reports; a CPU
    reports none, and they always fit. Otherwise ``mesh.fsdp`` is the number of all devices. Several
    processes always use all devices.

    Args:
      definition: definition of the model.
    """
    devices = jax.devices()
    size = sum(leaf.nbytes for leaf in definition.in_checkpoint().values())
    limit = (devices[0].memory_stats() or {}).get("bytes_limit") if len(devices) > 1 else None
    if jax.process_count() == 1 and (limit is None or size <= WEIGHTS_SHARE * limit):
        return single_device_mesh()
    return make_mesh(dict.fromkeys(MESH_AXES, 1) | {"fsdp": len(devices)})
