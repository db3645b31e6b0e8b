"""Normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxtune.layers.tree import parameter


class RMSNorm(nnx.Module):
    """Root-mean-square norm: normalised in float32, rounded, then scaled.

    Source: Zhang and Sennrich, 2019; the order of rounding is that of transformers' LlamaRMSNorm.
    """

    def __init__(self, features: int, eps: float):
        self.eps = eps
        self.weight = parameter((features,), ("norm",), "ones")

    def __call__(self, x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
        """Normalises x [..., features] over its last axis, to `dtype` or the dtype of x."""
        dtype = x.dtype if dtype is None else dtype
        y = x.astype(jnp.float32)
        y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(dtype) * y.astype(dtype)
