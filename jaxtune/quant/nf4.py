"""NormalFloat: 4-bit codes for quantiles of the normal distribution, with a scale per 64 values.

The value is NF4[code] · absmax of its block. With double quantization the scales are 8-bit codes
around their mean, in blocks of 256: absmax = DYNAMIC[code] · nested_absmax + nested_offset.

Codes and scales agree bit for bit with bitsandbytes. Its blocks run over the flattened weight: if a
row is not a multiple of 64 values, they extend over the ends of rows. Scales are then stored flat,
[blocks], and otherwise as [in / 64, out], which can be sharded along with the codes.

Source: Dettmers et al., 2023 (QLoRA); Dettmers et al., 2021 (the 8-bit map).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.quant.codes import (
    AnyArray,
    array_namespace,
    look_up,
    pack,
    packed_size,
    spread,
    unpack,
)
from jaxtune.quant.weight import Format, Parts, PartSpec

BLOCK = 64
NESTED_BLOCK = 256
# fmt: off
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
     -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
     0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)
# fmt: on
_MIDPOINTS = (NF4[1:] + NF4[:-1]) / 2  # boundaries between codes


def _linspace(steps: int) -> np.ndarray:
    """Returns `steps` + 1 points from 0.1 to 1 with the same rounding as torch.linspace.

    torch computes points of the first half from the low end and the others from the high end, each
    with a fused multiply-add, which float64 arithmetic and one rounding to float32 reproduce.
    """
    low, high = np.float32(0.1), np.float32(1)
    step, index = np.float64((high - low) / np.float32(steps)), np.arange(steps + 1)
    upward, downward = low + step * index, high - step * (steps - index)
    return np.where(index < (steps + 1) // 2, upward, downward).astype(np.float32)


def _dynamic_map() -> np.ndarray:
    """Returns the 256 ascending values of the signed 8-bit map.

    Seven decades from 1e-7 … 1e-6 to 0.1 … 1 have 1, 2, 4, … 64 steps each, with the midpoint of a
    step as its value, positive and negative; 0 and 1 complete the 2 · 127 + 2 values.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = _linspace(2**exponent)
        means = (bounds[:-1] + bounds[1:]) / np.float32(2)
        decade = (np.float32(10.0 ** (exponent - 6)) * means).tolist()
        values += decade + [-value for value in decade]
    return np.sort(np.array(values, np.float32))


DYNAMIC = _dynamic_map()


@dataclasses.dataclass(frozen=True)
class NormalFloat4(Format):
    """Settings of the format.

    Attributes:
      double: whether the scales are quantized too.
    """

    name: ClassVar[str] = "nf4"

    double: bool = True

    def parts(self, shape: tuple[int, int]) -> dict[str, PartSpec]:
        """Returns codes and scales and, with double quantization, the scales' scales and offset."""
        rows, columns = shape
        blocks, axes = _block_shape(shape), (1, 0) if columns % BLOCK == 0 else (None,)
        codes = PartSpec((packed_size(columns), rows), jnp.uint8, (1, 0))
        if not self.double:
            return {"codes": codes, "absmax": PartSpec(blocks, jnp.float32, axes)}
        nested = (-(-math.prod(blocks) // NESTED_BLOCK),)
        return {
            "codes": codes,
            "absmax": PartSpec(blocks, jnp.uint8, axes),
            "nested_absmax": PartSpec(nested, jnp.float32, (None,)),
            "nested_offset": PartSpec((), jnp.float32, ()),
        }

    def row_multiple(self, columns: int) -> int:
        """Returns the smallest number of rows that is a whole number of blocks."""
        return BLOCK // math.gcd(columns, BLOCK)

    def encode(self, weight: jax.Array) -> Parts:
        """Quantizes float32 [rows, in]; the scales stay float32 until `finish`.

        The code of a value is the number of midpoints below it. Like bitsandbytes, values are
        multiplied by the reciprocal of the scale, which rounds differently from a division.
        """
        rows, columns = weight.shape
        flat = jnp.pad(weight.reshape(-1), (0, -weight.size % BLOCK)).reshape(-1, BLOCK)
        absmax = jnp.max(jnp.abs(flat), axis=1)
        scaled = (flat * (1 / jnp.where(absmax == 0, 1, absmax))[:, None]).reshape(-1)
        scaled = scaled[: weight.size].reshape(rows, columns)
        codes = sum((scaled > midpoint).astype(jnp.uint8) for midpoint in _MIDPOINTS)
        return {
            "codes": pack(jnp.asarray(codes)),
            "absmax": absmax.reshape(rows, -1).T if columns % BLOCK == 0 else absmax,
        }

    def finish(self, parts: Parts) -> Parts:
        """Quantizes the scales of a whole weight, whose mean is the offset."""
        if not self.double:
            return parts
        # Nested blocks run over the scales in the order of bitsandbytes, row by row of the weight;
        # [in / 64, out] is transposed to it, and flat scales are unchanged.
        absmax = np.asarray(parts["absmax"])
        codes, nested, offset = quantize_scales(absmax.T.reshape(-1))
        return {
            "codes": parts["codes"],
            "absmax": codes.reshape(absmax.T.shape).T,
            "nested_absmax": nested,
            "nested_offset": offset,
        }

    def decode(self, parts: Mapping[str, AnyArray], shape: tuple[int, int]) -> AnyArray:
        """Returns float32 [out, in]; JAX or NumPy."""
        rows, columns = shape
        absmax = self._absmax(parts)
        scales: Any
        if columns % BLOCK == 0:
            scales = spread(absmax, BLOCK, columns)
        else:
            repeat = array_namespace(absmax).repeat
            scales = repeat(absmax, BLOCK)[: rows * columns].reshape(shape).T
        return decode_values(unpack(parts["codes"], columns), scales).T

    def _absmax(self, parts: Mapping[str, AnyArray]) -> AnyArray:
        if not self.double:
            return parts["absmax"]
        codes, nested = parts["absmax"], parts["nested_absmax"]
        nested = array_namespace(nested).repeat(nested, NESTED_BLOCK)[: codes.size]
        return decode_scales(codes, nested.reshape(codes.T.shape).T, parts["nested_offset"])


def decode_values(codes: AnyArray, scales: AnyArray) -> AnyArray:
    """Returns float32 values of 4-bit codes.

    Args:
      codes: uint8 of any shape, JAX or NumPy.
      scales: float32 of that shape: the scale of each value's block.
    """
    return look_up(NF4, codes) * scales


def decode_scales(codes: AnyArray, nested: AnyArray, offset: Any) -> AnyArray:
    """Returns the float32 scales of 8-bit codes.

    Args:
      codes: uint8 of any shape, JAX or NumPy.
      nested: float32 of that shape: the scale of each code's block.
      offset: float32 scalar.
    """
    return _rounded(look_up(DYNAMIC, codes) * nested, offset) + offset


def _rounded(product: AnyArray, other: Any) -> AnyArray:
    """Returns a float32 product unchanged, but keeps XLA from fusing it with a following addition.

    bitsandbytes rounds the product before it adds. A fused multiply-add does not, and the last bit
    would differ. XLA drops optimization barriers before fusion. An XOR with a data-dependent zero
    survives and prevents it: the mask `other != other` is zero unless `other` is NaN, which the
    compiler cannot know. NumPy never fuses.

    Args:
      product: the product, float32 of any shape.
      other: the float32 scalar that is added to it.
    """
    if isinstance(product, np.ndarray):
        return product
    no_bits = (other != other).astype(jnp.uint32)
    bits = lax.bitcast_convert_type(product, jnp.uint32) ^ no_bits
    return lax.bitcast_convert_type(bits, jnp.float32)


def _block_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    rows, columns = shape
    if columns % BLOCK == 0:
        return columns // BLOCK, rows
    return (-(-rows * columns // BLOCK),)


def quantize_scales(
    absmax: np.ndarray, offset: np.float32 | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantizes scales to 8 bits around an offset.

    Args:
      absmax: float32 [blocks].
      offset: value subtracted first; the mean by default.

    Returns:
      (codes uint8 [blocks], nested scales float32 [⌈blocks / 256⌉], offset float32 scalar).
    """
    if offset is None:
        offset = np.float32(absmax.mean(dtype=np.float64))
    centred = np.pad(absmax - offset, (0, -absmax.size % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = np.abs(centred).max(axis=1)
    scaled = centred * (1 / np.where(nested == 0, 1, nested))[:, None]
    codes = np.searchsorted((DYNAMIC[1:] + DYNAMIC[:-1]) / 2, scaled.reshape(-1), side="left")
    codes = np.where(np.repeat(nested, NESTED_BLOCK) == 0, 0, codes)
    return codes.astype(np.uint8)[: absmax.size], nested, np.asarray(offset, np.float32)
