"""Rematerialisation policies by name: what a layer saves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxtune.errors import lookup
from jaxtune.registry import REMAT_POLICIES


def remat(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wraps the body of a scan over layers.

    Args:
      body: the function that computes one layer.
      policy: "none" keeps every residual; "full" keeps only the layer's input; the others keep
        the named activations as well.

    Raises:
      JaxtuneError: an unknown policy.
    """
    names = lookup(REMAT_POLICIES, policy, "training.remat")
    if names is None:
        return body
    saved = jax.checkpoint_policies.save_only_these_names(*names)
    # Inside a scan the loop itself keeps the recomputation from being merged with the forward.
    return jax.checkpoint(body, policy=saved, prevent_cse=False)
