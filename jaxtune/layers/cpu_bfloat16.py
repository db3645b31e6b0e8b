"""Stacked bfloat16 weights as bits, for XLA's CPU backend.

That backend has no bfloat16 slice: a loop over stacked layers would make it convert the whole
stack to float32 ahead of the loop, and hold it. Slices of integers stay slices, so on a CPU the
stacks enter the compiled function as uint16, and each layer turns its own slice back.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.layers.tree import Tree, flatten, unflatten

_STACKS = ("model", "layers")


def as_bits(tree: Tree, platform: str) -> Tree:
    """Returns the tree as a compiled function takes it on this platform.

    On a CPU bfloat16 arrays of stacked layers become uint16 views of the same memory; elsewhere
    the tree is returned as it is.

    Args:
      tree: arrays, or ShapeDtypeStructs, by path.
      platform: of the devices.
    """
    if platform != "cpu":
        return tree
    return unflatten({path: _view(path, leaf) for path, leaf in flatten(tree)})


def from_bits(tree: Any) -> Any:
    """Turns one layer's uint16 leaves back into bfloat16, inside a compiled loop."""
    return jax.tree.map(
        lambda a: lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, tree
    )


def _view(path: tuple[str, ...], leaf: Any) -> Any:
    if path[:2] != _STACKS:
        return leaf
    return jax.tree.map(_view_array, leaf)


def _view_array(leaf: Any) -> Any:
    if leaf.dtype != jnp.bfloat16:
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.uint16, sharding=leaf.sharding)
    shards = [
        jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device)
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
