"""Rematerialisation policies by name: what a layer saves for its backward pass."""

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
      policy: "none" keeps every residual; "full" keeps only the layer's input; the others keep
        the named activations as well.

    Raises:
      JaxtuneError: an unknown policy.
    """
    lookup(dict.fromkeys(POLICIES), policy, "training.remat")
    if policy == "none":
        return body
    saved = jax.checkpoint_policies.save_only_these_names(*_NAMES[policy])
    # Inside a scan the loop itself keeps the recomputation from being merged with the forward.
    return jax.checkpoint(body, policy=saved, prevent_cse=False)
