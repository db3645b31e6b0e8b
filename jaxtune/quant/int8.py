"""8-bit integers with a scale for each row: w = code · absmax / 127.

Source: Dettmers et al., 2022 (LLM.int8()); the rounding is that of bitsandbytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.quant.codes import AnyArray
from jaxtune.quant.weight import Format, Parts, PartSpec


@dataclasses.dataclass(frozen=True)
class Int8(Format):
    """The format; it has no settings."""

    name: ClassVar[str] = "int8"

    def parts(self, shape: tuple[int, int]) -> dict[str, PartSpec]:
        """Returns codes and the largest magnitude of each row."""
        return {
            "codes": PartSpec(shape, jnp.int8, (0, 1)),
            "absmax": PartSpec(shape[:1], jnp.float32, (0,)),
        }

    def encode(self, weight: jax.Array) -> Parts:
        """Quantizes float32 [rows, in]."""
        absmax = jnp.max(jnp.abs(weight), axis=1)
        codes = jnp.round(weight * (127 / jnp.where(absmax == 0, 1, absmax))[:, None])
        return {"codes": codes.astype(jnp.int8), "absmax": absmax}

    def decode(self, parts: Mapping[str, AnyArray], shape: tuple[int, int]) -> AnyArray:
        """Returns float32 [out, in]; JAX or NumPy."""
        del shape
        scaled = parts["codes"].astype(np.float32) * parts["absmax"][:, None]
        return scaled * np.float32(1 / 127)
