"""Weight formats: quantized representations of frozen weights.

A format is one file with a `Format`, whose fields are options of the ``quantize`` section, and one
line in `jaxtune.registry.WEIGHT_FORMATS`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

from jaxtune.config import QuantizeConfig
from jaxtune.errors import lookup
from jaxtune.quant.weight import Format, QuantizedWeight
from jaxtune.registry import WEIGHT_FORMATS

__all__ = [
    "Format",
    "Quantization",
    "QuantizedWeight",
    "is_quantized",
    "materialize",
    "quantization_from_config",
]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The quantization of a frozen base.

    Attributes:
      format: weight format with its settings.
      modules: modules to quantize; see `jaxtune.adapters.targets.match_targets`.
    """

    format: Format
    modules: tuple[str, ...] = ("all-linear",)


def quantization_from_config(section: QuantizeConfig) -> Quantization | None:
    """Returns the quantization that the ``quantize`` section of a config selects, or None.

    Raises:
      JaxtuneError: an unknown format.
    """
    if not section.format:
        return None
    entry = lookup(WEIGHT_FORMATS, section.format, "quantize.format")
    settings = {name: getattr(section, name) for name in entry.options if name != "modules"}
    return Quantization(entry.load()(**settings), section.modules)


def is_quantized(weight: Any) -> bool:
    """Returns whether a weight is stored in a weight format rather than as a plain array."""
    return hasattr(weight, "dequantize")


def materialize(weight: Any, dtype: DTypeLike) -> jax.Array:
    """Returns a plain or quantized weight of any shape as an array of `dtype`."""
    if is_quantized(weight):
        return weight.dequantize(dtype)
    return weight.astype(dtype)
