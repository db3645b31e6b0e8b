"""Merging: the weights of the base with the adapter's edit folded in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jaxtune.adapters.targets import linears
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Path, declaration_of


def merged_weight(linear: Any, layer: int) -> Any:
    """Returns W + scale · B A, float32 [out, in], of one layer of a projection."""
    stacked = declaration_of(linear.weight).layers is not None

    def of_layer(value: Any) -> Any:
        return value[layer] if stacked else value

    weight = of_layer(linear.weight.get_value()).astype(jnp.float32)
    edit = linear.adapter.edit()
    lora_A, lora_B, scale = (of_layer(value) for value in edit)
    return weight + scale * jnp.matmul(lora_B, lora_A, precision=lax.Precision.HIGHEST)


def edits(model: CausalLM) -> dict[Path, Callable[[int], Any]]:
    """Returns, for every edited weight of a bound model, how to compute a layer's merged one."""
    return {
        (*path, "weight"): lambda layer, linear=linear: merged_weight(linear, layer)
        for path, linear in linears(model).items()
        if linear.adapter is not None
    }
