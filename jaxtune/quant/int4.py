"""4-bit integers with a scale for each group of columns, or for each row.

Symmetric: w = scale · (code − 8). The range of code − 8 is −8 … 7, so the value of largest
magnitude is mapped to −8 (code 0) whatever its sign; if it is positive, the scale is negative.
Asymmetric: w = scale · (code − zero), with a zero point for each group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.quant.codes import AnyArray, in_groups, pack, packed_size, spread, unpack
from jaxtune.quant.weight import Format, Parts, PartSpec


@dataclasses.dataclass(frozen=True)
class Int4(Format):
    """Settings of the format.

    Attributes:
      group_size: number of columns that share a scale; 0 for the whole row.
      symmetric: whether the zero point is 8 for all groups.
    """

    name: ClassVar[str] = "int4"

    group_size: int = 64
    symmetric: bool = True

    def _size(self, columns: int) -> int:
        return self.group_size or columns

    def parts(self, shape: tuple[int, int]) -> dict[str, PartSpec]:
        """Returns codes, bfloat16 scales and, if asymmetric, zero points."""
        rows, columns = shape
        groups = (-(-columns // self._size(columns)), rows)
        parts = {
            "codes": PartSpec((packed_size(columns), rows), jnp.uint8, (1, 0)),
            "scale": PartSpec(groups, jnp.bfloat16, (1, 0)),
        }
        if not self.symmetric:
            parts["zero"] = PartSpec(groups, jnp.uint8, (1, 0))
        return parts

    def encode(self, weight: jax.Array) -> Parts:
        """Quantizes float32 [rows, in].

        Codes are computed from the scales after their rounding to bfloat16, so that each is the
        nearest to the weight under the stored scale.
        """
        columns = weight.shape[1]
        grouped = in_groups(weight, self._size(columns))
        if self.symmetric:
            largest = jnp.argmax(jnp.abs(grouped), axis=-1, keepdims=True)
            scale = jnp.take_along_axis(grouped, largest, axis=-1)[..., 0] / -8
            zero = None
        else:
            low = jnp.minimum(jnp.min(grouped, axis=-1), 0)
            high = jnp.maximum(jnp.max(grouped, axis=-1), 0)
            scale = (high - low) / 15
            zero = jnp.clip(jnp.round(-low / _unless_zero(scale)), 0, 15)
        scale = scale.astype(jnp.bfloat16)
        steps = jnp.round(grouped / _unless_zero(scale.astype(jnp.float32))[..., None])
        codes = jnp.clip(steps + (8 if zero is None else zero[..., None]), 0, 15)
        codes = codes.astype(jnp.uint8).reshape(weight.shape[0], -1)[:, :columns]
        parts: Parts = {"codes": pack(codes), "scale": scale.T}
        return parts if zero is None else {**parts, "zero": zero.astype(jnp.uint8).T}

    def decode(self, parts: Mapping[str, AnyArray], shape: tuple[int, int]) -> AnyArray:
        """Returns float32 [out, in]; JAX or NumPy."""
        columns = shape[1]
        size = self._size(columns)
        codes = unpack(parts["codes"], columns)
        scale = spread(parts["scale"].astype(np.float32), size, columns)
        if self.symmetric:
            return decode_values(codes, scale).T
        zero = spread(parts["zero"].astype(np.float32), size, columns)
        return decode_values(codes, scale, zero).T


def decode_values(codes: AnyArray, scale: AnyArray, zero: AnyArray | float = 8) -> AnyArray:
    """Returns scale · (code − zero), float32, value by value; JAX or NumPy.

    Args:
      codes: uint8 of any shape.
      scale: float32 of that shape.
      zero: zero points, float32 of that shape; 8 for all values of a symmetric weight.
    """
    return (codes.astype(np.float32) - zero) * scale


def _unless_zero(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 1, scale)
