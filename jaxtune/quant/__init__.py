"""Weight formats: what a frozen weight may be stored as besides a plain array.

A format is one file with a pytree dataclass that has ``dequantize(dtype)``, and one line here.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

FORMATS: dict[str, Any] = {}


def materialize(weight: Any, dtype: DTypeLike) -> jax.Array:
    """Returns a plain or quantized weight of any shape as an array of `dtype`."""
    if hasattr(weight, "dequantize"):
        return weight.dequantize(dtype)
    return weight.astype(dtype)
