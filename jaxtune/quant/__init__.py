"""Weight formats: what a frozen weight may be stored as besides a plain array.

A format is one file with a `Format`, and one line in `FORMATS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.typing import DTypeLike

from jaxtune.errors import lookup
from jaxtune.quant.fp8 import Float8
from jaxtune.quant.int4 import Int4
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import NormalFloat4
from jaxtune.quant.weight import Format, QuantizedWeight

__all__ = [
    "FORMATS",
    "Format",
    "Quantization",
    "QuantizedWeight",
    "is_quantized",
    "materialize",
    "quantization_from_config",
]

FORMATS: dict[str, Callable[[Any], Format]] = {
    "nf4": lambda section: NormalFloat4(section.double),
    "int4": lambda section: Int4(section.group_size, section.symmetric),
    "int8": lambda section: Int8(),
    "fp8": lambda section: Float8(),
}
"""Makes a format with the settings of the ``quantize`` section of a config."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which weights of a frozen base are quantized, and how.

    Attributes:
      format: with its settings.
      modules: targets as `jaxtune.adapters.targets.match_targets` takes them.
    """

    format: Format
    modules: tuple[str, ...] = ("all-linear",)


def quantization_from_config(section: Any) -> Quantization | None:
    """Returns what the ``quantize`` section of a config asks for; None for 16 or 32 bits.

    Raises:
      JaxtuneError: an unknown format.
    """
    if not section.format:
        return None
    make = lookup(FORMATS, section.format, "quantize.format")
    return Quantization(make(section), tuple(section.modules))


def is_quantized(weight: Any) -> bool:
    """Says whether a weight is something other than a plain array."""
    return hasattr(weight, "dequantize")


def materialize(weight: Any, dtype: DTypeLike) -> jax.Array:
    """Returns a plain or quantized weight of any shape as an array of `dtype`."""
    if is_quantized(weight):
        return weight.dequantize(dtype)
    return weight.astype(dtype)
