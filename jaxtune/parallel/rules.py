"""The table from logical axes to mesh axes, and the functions that apply it.

Every parameter, optimizer moment, batch and activation has logical axes ("heads", "embed",
"batch"); the table maps each of them to the mesh axes that split it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("sequence",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # the hidden dimension of a weight
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "layers": (),
    "rank": (),
    "norm": (),
    "hidden": (),  # the hidden dimension of an activation
}


def partition_spec(axes: Sequence[str | None]) -> PartitionSpec:
    """Returns the PartitionSpec of an array whose dimensions have these logical axes."""
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        names = RULES[axis] if axis is not None else ()
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def devices_along(axis: str) -> int:
    """Returns the number of devices that split a logical axis; 1 without a mesh in context."""
    if not _partitioned():
        return 1
    return math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in RULES[axis])


def _partitioned() -> bool:
    """Returns whether the compiler partitions the traced function over a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and AxisType.Manual not in mesh.axis_types


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation of any shape by the logical axes of its dimensions.

    Dimensions that the mesh does not divide stay whole. Has no effect without a mesh in context and
    inside `jax.shard_map`.
    """
    if not _partitioned():
        return x
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, even_spec(axes, x.shape, mesh.shape))


def even_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]
) -> PartitionSpec:
    """Returns the PartitionSpec of an array, without mesh axes that do not divide a dimension.

    XLA splits arrays into equal parts; each device holds other dimensions whole.

    Args:
      axes: logical axis of each dimension.
      shape: shape of the array.
      mesh_shape: devices along each mesh axis.
    """
    entries = tuple(partition_spec(axes))
    return PartitionSpec(
        *(
            entry if size % _devices_along(entry, mesh_shape) == 0 else None
            for entry, size in zip(entries, shape, strict=True)
        )
    )


def _devices_along(entry: object, mesh_shape: Mapping[str, int]) -> int:
    names = (entry,) if isinstance(entry, str) else entry if isinstance(entry, tuple) else ()
    return math.prod(mesh_shape[name] for name in names)
