"""The arguments of a training step: shapes, dtypes and sizes, without allocating them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.quant import QuantizedWeight
from jaxtune.training.placement.memory import bytes_per_device
from jaxtune.training.setup import Setup


def step_arguments(setup: Setup) -> tuple[Any, Any, Any, Any]:
    """Returns the step's arguments (state, base, constants, batch) as ShapeDtypeStructs."""
    definition, mesh = setup.definition, setup.mesh
    return (
        setup.like,
        definition.abstract("base", mesh),
        definition.abstract("constants", mesh),
        setup.batch_like(),
    )


def by_kind(arguments: tuple[Any, Any, Any, Any]) -> dict[str, Any]:
    """Returns the trees of `step_arguments` by name, with the state split into its parts."""
    state, base, constants, batch = arguments
    return {
        "base": base,
        "trainable": state.trainable,
        "optimizer": (state.opt_state, state.step),
        "constants": constants,
        "batch": batch,
    }


def base_formats(base: Any, mesh: Mapping[str, int] | None = None) -> dict[str, int]:
    """Returns the bytes per device of a base by storage format, the largest first."""
    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(base, is_leaf=lambda x: isinstance(x, QuantizedWeight)):
        name = leaf.format.name if isinstance(leaf, QuantizedWeight) else str(leaf.dtype)
        sizes[name] = sizes.get(name, 0) + bytes_per_device(leaf, mesh)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
