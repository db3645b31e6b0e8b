"""The device mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxtune.compatibility import check_versions
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.rules import MESH_AXES, even_spec


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """Returns the size of every mesh axis, in the order of `MESH_AXES`.

    Args:
      sizes: devices along each axis; at most one may be -1, for all remaining devices.
      devices: number of devices.

    Raises:
      JaxtuneError: the sizes do not multiply to `devices`; the message suggests sizes that do.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    if 0 in shape or shape.count(-1) > 1:
        raise JaxtuneError(
            "mesh sizes must be positive, and at most one may be -1: " + _show(sizes)
        )
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % fixed == 0:
        shape[shape.index(-1)] = devices // fixed
    if math.prod(shape) != devices:
        raise JaxtuneError(
            f"{_show(sizes)} does not use all {devices} device(s); "
            f"mesh.data=-1 with the others at 1 always does"
        )
    return tuple(shape)


def _show(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in MESH_AXES)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of a run; sharding is left to the compiler (automatic axis types).

    Args:
      sizes: devices along each of `MESH_AXES`; one of them may be -1.
      devices: all devices of the run by default.

    Raises:
      JaxtuneError: the sizes do not use all devices, or do not fit their links.
    """
    check_versions()
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    try:
        return jax.make_mesh(
            shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
        )
    except NotImplementedError as error:
        raise JaxtuneError(
            f"{_show(dict(zip(MESH_AXES, shape, strict=True)))}: the links between these "
            f"{len(devices)} chips do not divide into axes of these sizes; use products of the "
            "sizes of their grid, such as 4 and 16 of 4x4x4"
        ) from error


def single_device_mesh() -> Mesh:
    """Returns a mesh of one device, the default of loading and generation."""
    return make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding on `mesh` of an array with these logical axes; see `even_spec`."""
    return NamedSharding(mesh, even_spec(axes, shape, mesh.shape))
