"""Merging: the weights of the base with the adapter's edit folded in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtune.adapters.targets import linears
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import LowRank, edited_weight
from jaxtune.layers.tree import Path, declaration_of

# Computes the merged weight [out, in] of one layer (and expert) in a dtype.
Edit = Callable[[int, DTypeLike], jax.Array]


@functools.partial(jax.jit, static_argnames="dtype")
def _merge(weight: Any, edit: LowRank, place: tuple[Any, ...], dtype: DTypeLike) -> jax.Array:
    # One program, so that no float32 copy of the weight outlives it.
    weight, edit = jax.tree.map(lambda value: value[place], (weight, edit))
    return edited_weight(weight, edit, dtype)


def merged_weight(linear: Any, part: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns W + scale · B A of one layer (and expert), [out, in], rounded once to `dtype`."""
    place = np.unravel_index(part, declaration_of(linear.weight).stack_shape)
    weight, edit = linear.weight.get_value(), linear.adapter.edit()
    return _merge(weight, edit, place, jnp.dtype(dtype))


def edits(model: CausalLM) -> dict[Path, Edit]:
    """Returns, for every edited weight of a bound model, how to compute a layer's merged one."""
    return {
        (*path, "weight"): functools.partial(merged_weight, linear)
        for path, linear in linears(model).items()
        if linear.adapter is not None
    }
