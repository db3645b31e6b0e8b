"""8-bit floats (e4m3) with a scale for each block of rows and columns: w = code · scale.

The published checkpoints of DeepSeek-V3 and R1 have this format, with blocks of 128 × 128, and can
be used as a frozen base without conversion. Blocks at the edges may be smaller.

Source: DeepSeek-V3 report (2024), and config.json's ``weight_block_size``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from jaxtune.quant.codes import AnyArray, array_namespace, spread
from jaxtune.quant.weight import Format, Parts, PartSpec

LARGEST = 448.0  # largest float8_e4m3fn value
# All float8_e4m3fn values by their bits: in NumPy a look-up is several times faster than a cast.
_TABLE = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Float8(Format):
    """Settings of the format.

    Attributes:
      block: (rows, columns) that share a scale.
    """

    name: ClassVar[str] = "fp8"

    block: tuple[int, int] = (128, 128)

    def parts(self, shape: tuple[int, int]) -> dict[str, PartSpec]:
        """Returns codes, as bytes, and the scale of each block."""
        blocks = tuple(-(-n // size) for n, size in zip(shape, self.block, strict=True))
        return {
            # Stored as bytes, because XLA's CPU backend has no slice of 8-bit floats.
            "codes": PartSpec(shape, jnp.uint8, (0, 1)),
            "scale": PartSpec(blocks, jnp.float32, (None, None)),
        }

    def row_multiple(self, columns: int) -> int:
        """Returns the rows of a block."""
        del columns
        return self.block[0]

    def encode(self, weight: jax.Array) -> Parts:
        """Quantizes float32 [rows, in]: each block's largest magnitude becomes `LARGEST`.

        The magnitudes are padded to whole blocks and viewed as [row blocks, tall, column blocks,
        wide], whose maximum over axes 1 and 3 is that of each block.
        """
        (rows, columns), (tall, wide) = weight.shape, self.block
        padded = jnp.pad(jnp.abs(weight), ((0, -rows % tall), (0, -columns % wide)))
        absmax = jnp.max(padded.reshape(-(-rows // tall), tall, -1, wide), axis=(1, 3))
        scale = jnp.where(absmax == 0, 1, absmax / LARGEST)
        codes = (weight / self._over(scale, (rows, columns))).astype(jnp.float8_e4m3fn)
        return {"codes": lax.bitcast_convert_type(codes, jnp.uint8), "scale": scale}

    def decode(self, parts: Mapping[str, AnyArray], shape: tuple[int, int]) -> AnyArray:
        """Returns float32 [out, in]; JAX or NumPy."""
        codes, scale = parts["codes"], parts["scale"]
        if isinstance(codes, np.ndarray) and isinstance(scale, np.ndarray):
            return self._decode_rows(codes, scale)
        return _values(codes) * self._over(scale, shape)

    def numbers(self, key: str, part: np.ndarray) -> np.ndarray:
        """Returns a view of a part, of any shape: the codes are float8_e4m3fn."""
        return part.view(ml_dtypes.float8_e4m3fn) if key == "codes" else part

    def _decode_rows(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Returns float32 [out, in], decoding one row of blocks at a time into the result.

        np.take converts its indices to 8 bytes each; for one row of blocks they fit into a cache.

        Args:
          codes: uint8 [out, in].
          scale: float32 [row blocks, column blocks].
        """
        tall, wide = self.block
        values = np.empty(codes.shape, np.float32)
        for first in range(0, codes.shape[0], tall):
            rows = slice(first, first + tall)
            across = np.repeat(scale[first // tall], wide)[: codes.shape[1]]
            np.multiply(np.take(_TABLE, codes[rows]), across, out=values[rows])
        return values

    def _over(self, scale: AnyArray, shape: tuple[int, int]) -> AnyArray:
        """Repeats each block's scale over the block: [row blocks, column blocks] → [out, in]."""
        rows = array_namespace(scale).repeat(scale, self.block[1], axis=1)[:, : shape[1]]
        return spread(rows, self.block[0], shape[0])


def _values(codes: AnyArray) -> AnyArray:
    """Returns the float32 values of float8_e4m3fn bits, uint8 of any shape."""
    if isinstance(codes, np.ndarray):
        return np.take(_TABLE, codes)
    return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
