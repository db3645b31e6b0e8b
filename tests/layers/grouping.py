"""Rows that are routed to experts, and how tests multiply and compare them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxtune.layers.experts.grouped import group, grouped_linear

EXPERTS, IN, OUT = 6, 20, 12
# Sums of some tens of float32 products in another order.
FLOAT32 = 2e-6
# The result of a bfloat16 product is rounded once, to 8 bits.
BFLOAT16 = 2.0**-7


def routes(kind, rows, experts=EXPERTS):
    """Returns the expert of each row."""
    rng = np.random.default_rng(0)
    chosen = {
        "even": range(experts),
        "random": rng.integers(0, experts, rows),
        "one-takes-all": [experts // 3],
        "the-last-takes-all": [experts - 1],
        "the-first-is-empty": range(1, experts),
        "most-are-empty": [1, experts - 2],
    }[kind]
    return np.resize(chosen, rows).astype(np.int32)


def ours(x, weight, expert, kernel="loop"):
    """Multiplies each row with the weight of its expert: [N, in] → float32 [N, out]."""
    groups = group(expert, weight.shape[0], kernel)
    padded = jnp.pad(x, ((0, 1), (0, 0)))[groups.source]
    return grouped_linear(padded, weight, groups, weight.shape[1])[groups.slot]


def relative(value, expected):
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    return np.max(np.abs(value - expected)) / np.max(np.abs(expected))
