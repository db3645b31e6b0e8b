"""Rematerialisation policies by name: the activations that a layer saves for its backward pass."""

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
      policy: "none" keeps every residual; "full" keeps only the layer's input; the others also
        keep the activations that they name.

    Raises:
      JaxtuneError: an unknown policy.
    """
    names = lookup(REMAT_POLICIES, policy, "training.remat")
    if names is None:
        return body
    saved = jax.checkpoint_policies.save_only_these_names(*names)
    # prevent_cse is not needed in a scan: the loop keeps XLA from merging the recomputation with
    # the forward pass.
    return jax.checkpoint(body, policy=saved, prevent_cse=False)
