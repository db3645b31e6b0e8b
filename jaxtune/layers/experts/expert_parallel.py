"""Routed experts over the devices of a mesh.

Tokens are sharded over all devices, and experts along the mesh axis "expert". Each device gathers
the tokens of the devices along this axis and applies its own experts; the sums are scattered back
to the devices of the tokens. Weights sharded over "fsdp" are gathered for one layer at a time, in
their stored form: a quantized stack is sent as codes. As on a single device, an expert computes as
many rows as choose it, and no token is dropped.

The compiler does not find this partition by itself: it gathers all rows on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxtune.layers.tree import declaration_of
from jaxtune.parallel.rules import partition_spec

AXIS = "expert"

# rows [N, H], experts int32 [N, k], weights [N, k], a random key or None, the experts of this
# device → [N, H]. An index of E or more marks an expert of another device.
Apply = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None, Any], jax.Array]


def token_spec(shape: tuple[int, ...]) -> PartitionSpec | None:
    """Returns the sharding of tokens [B, T, …] for `apply_over_mesh`, or None without a mesh.

    The hidden dimension is whole here, so "tensor" splits the sequence. None as well if the devices
    do not divide the tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return None
    batch, sequence = partition_spec(("batch",))[0], ("sequence", "tensor")
    axes = (batch,) if isinstance(batch, str) else tuple(batch or ())
    parts = (math.prod(mesh.shape[axis] for axis in group) for group in (axes, sequence))
    if any(size % part for size, part in zip(shape, parts, strict=False)):
        return None  # a few tokens, as in decoding: the compiler partitions them
    return PartitionSpec(axes, sequence, None)


def apply_over_mesh(
    module: nnx.Module,
    spec: PartitionSpec,
    x: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    key: jax.Array | None,
    apply: Apply,
) -> jax.Array:
    """Applies stacked experts to tokens, on the devices of the mesh in context.

    Args:
      module: the experts' weights; see `parameter(…, experts=E)`.
      spec: sharding of the tokens, from `token_spec`.
      x: [B, T, H].
      experts: int32 [B, T, k], the chosen experts of each token.
      weights: [B, T, k], factors on their outputs.
      key: for dropout; None turns it off.
      apply: the computation of a device with its rows and its experts.

    Returns:
      [B, T, H] with the sharding `spec`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shares = mesh.shape[AXIS]
    graphdef, state = nnx.split(module)
    specs = jax.tree.map(_weight_spec, state, is_leaf=_is_variable)

    def on_each_device(
        state: Any, x: jax.Array, experts: jax.Array, weights: jax.Array, key: Any
    ) -> jax.Array:
        local = nnx.merge(graphdef, state)
        if shares > 1:
            x, experts, weights = (_gathered(a) for a in (x, experts, weights))
        lead = x.shape[:2]
        # Experts here, here + 1, …, here + own - 1 of the layer are on this device. Choices of
        # other experts get the index `own`, which `grouped.group` treats as "without an expert".
        own = _own_experts(state)
        here = lax.axis_index(AXIS) * own
        mine = (experts >= here) & (experts < here + own)
        chosen = jnp.where(mine, experts - here, own)
        if key is not None:  # devices have different rows, so their dropout must differ too
            key = jax.random.fold_in(key, lax.axis_index(mesh.axis_names))
        weights = jnp.where(mine, weights, 0)
        x, chosen, weights = (a.reshape(-1, a.shape[-1]) for a in (x, chosen, weights))
        out = apply(x, chosen, weights, key, local).reshape(*lead, -1)
        # Each device has the contributions of its own experts to all gathered tokens. The scatter
        # sums them and returns to each device its tokens.
        if shares > 1:
            out = lax.psum_scatter(out, AXIS, scatter_dimension=0, tiled=True)
        return out

    return jax.shard_map(
        on_each_device,
        mesh=mesh,
        in_specs=(specs, spec, spec, spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,  # loops with data-dependent trips do not declare how they vary
    )(state, x, experts, weights, key)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _weight_spec(variable: nnx.Variable) -> PartitionSpec:
    whole = declaration_of(variable).experts is None
    return PartitionSpec() if whole else PartitionSpec(AXIS)


def _gathered(a: jax.Array) -> jax.Array:
    return lax.all_gather(a, AXIS, axis=0, tiled=True)


def _own_experts(state: Any) -> int:
    """Returns the number of experts in this device's part of the stacks."""
    for variable in jax.tree.leaves(state, is_leaf=_is_variable):
        if declaration_of(variable).experts is not None:
            return jax.tree.leaves(variable)[0].shape[0]
    raise AssertionError("no weight of the module is stacked over experts")
