"""Merging: the weights of the base with the adapter's edit folded in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.adapters.targets import linears
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import edited_weight
from jaxtune.layers.tree import Path, declaration_of

# Computes the merged weight [out, in] of one layer (and expert) in a dtype.
Edit = Callable[[int, DTypeLike], jax.Array]


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def _merge(
    weight: Any, adapter: Any, place: tuple[Any, ...], graphdef: Any, dtype: DTypeLike
) -> jax.Array:
    # One program, so that no float32 copy of the weight outlives it.
    weight, adapter = jax.tree.map(lambda value: value[place], (weight, adapter))
    edit = nnx.merge(graphdef, adapter).edit(weight, None, jnp.float32)
    return edited_weight(weight, edit, dtype)


def merged_weight(linear: Any, part: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns the edited weight of one layer (and expert), [out, in], rounded once to `dtype`."""
    place = np.unravel_index(part, declaration_of(linear.weight).stack_shape)
    graphdef, adapter = nnx.split(linear.adapter)
    return _merge(linear.weight.get_value(), adapter, place, graphdef, jnp.dtype(dtype))


def edits(model: CausalLM) -> dict[Path, Edit]:
    """Returns, for every edited weight of a bound model, how to compute a layer's merged one."""
    return {
        (*path, "weight"): functools.partial(merged_weight, linear)
        for path, linear in linears(model).items()
        if linear.adapter is not None
    }
