"""The one table from logical axes to mesh axes, and the two functions that apply it.

Every parameter, optimizer moment, batch and activation names its axes logically ("heads",
"embed", "batch"); this table decides which mesh axis splits each.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
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


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins the sharding of an activation of any shape, one axis name for each of its dimensions.

    Without a mesh in context it does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
