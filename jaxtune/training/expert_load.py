"""How evenly the experts of a mixture are chosen."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_load(load: Any) -> Any:
    """Returns tokens per expert [layers, E] over the even share of the layer: 1 is even."""
    even = jnp.sum(load, axis=-1, keepdims=True) / load.shape[-1]
    return load / jnp.maximum(even, 1e-9)


def load_summary(load: Any) -> dict[str, jax.Array]:
    """Sums the load up, over all layers.

    Args:
      load: float [layers, E], tokens that chose each expert.

    Returns:
      ``expert_load_max`` and ``expert_load_min``, the largest and smallest load over the even
      share, and ``experts_unused``, how many no token chose.
    """
    relative = relative_load(load)
    return {
        "expert_load_max": jnp.max(relative),
        "expert_load_min": jnp.min(relative),
        "experts_unused": jnp.sum(load == 0).astype(jnp.float32),
    }


def load_table(load: np.ndarray, layers: list[int]) -> dict[str, list[float]]:
    """Lists the load of every expert over the even share of its layer.

    Args:
      load: float [layers, E], tokens that chose each expert.
      layers: the layers that these are.

    Returns:
      E numbers for each layer, by the name of its experts.
    """
    rows = np.asarray(relative_load(load)).round(4).tolist()
    names = [f"model.layers.{layer}.mlp.experts" for layer in layers]
    return dict(zip(names, rows, strict=True))
