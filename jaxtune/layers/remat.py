"""Rematerialisation policies by name: the activations that a layer saves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxtune.errors import lookup

_NAMES: dict[str, tuple[str, ...]] = {
    "full": (),
    "save_attention": ("attention",),
    "save_qkv": ("attention", "q_proj", "k_proj", "v_proj"),
    "save_mlp": ("attention", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
}
# From the least memory to the most speed.
POLICIES = ("full", "save_attention", "save_qkv", "save_mlp", "none")


def remat(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wraps the body of a scan over layers.

    Args:
      body: the function that computes one layer.
      policy: "none" keeps every residual; "full" keeps only the layer's input; the others also
        keep the activations that they name.

    Raises:
      JaxtuneError: an unknown policy.
    """
    lookup(dict.fromkeys(POLICIES), policy, "training.remat")
    if policy == "none":
        return body
    saved = jax.checkpoint_policies.save_only_these_names(*_NAMES[policy])
    # prevent_cse is not needed in a scan: the loop keeps XLA from merging the recomputation with
    # the forward pass.
    return jax.checkpoint(body, policy=saved, prevent_cse=False)
