"""Load of the experts in a mixture of experts: how evenly the router selects them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def relative_load(load: Any) -> Any:
    """Returns the load of each expert relative to an even load in its layer, which is 1.

    Args:
      load: float [layers, E], number of tokens of each expert.

    Returns:
      An array of the same shape; 0 in a layer without tokens.
    """
    even = jnp.sum(load, axis=-1, keepdims=True) / load.shape[-1]
    return load / jnp.maximum(even, 1e-9)


def load_summary(load: Any) -> dict[str, jax.Array]:
    """Summarizes the load over all layers.

    Args:
      load: float [layers, E], number of tokens of each expert.

    Returns:
      ``expert_load_max`` and ``expert_load_min``, the largest and smallest load relative to an even
      load, and ``experts_unused``, the number of experts without a token.
    """
    relative = relative_load(load)
    return {
        "expert_load_max": jnp.max(relative),
        "expert_load_min": jnp.min(relative),
        "experts_unused": jnp.sum(load == 0).astype(jnp.float32),
    }


def load_table(load: np.ndarray, layers: list[int]) -> dict[str, list[float]]:
    """Returns the load of every expert relative to an even load in its layer.

    Args:
      load: float [layers, E], number of tokens of each expert.
      layers: indices of these layers in the model.

    Returns:
      The E values of each layer by the module name of its experts, rounded to 4 digits.
    """
    rows = np.asarray(relative_load(load)).round(4).tolist()
    names = [f"model.layers.{layer}.mlp.experts" for layer in layers]
    return dict(zip(names, rows, strict=True))
