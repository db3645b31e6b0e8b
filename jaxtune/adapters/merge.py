"""Merging: folds the adapter's edit into the weights of the base."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.adapters.method import Method
from jaxtune.adapters.targets import module_names
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import Projection, edited_weight
from jaxtune.layers.tree import Path, Shared, declaration_of

# Computes the merged array of one layer (and expert) in a dtype: a weight [out, in] or bias [out].
WeightEdit = Callable[[int, DTypeLike], jax.Array]


@functools.partial(jax.jit, static_argnames=("graphdef", "which", "dtype"))
def _merge(
    frozen: Any, states: Any, place: tuple[Any, ...], graphdef: Any, which: str, dtype: DTypeLike
) -> jax.Array:
    # One jitted function from the stored parts to the result in `dtype`: the float32 weight in
    # between stays inside the program instead of being allocated as an output.
    shared, own = states
    (weight, bias), own = jax.tree.map(lambda value: value[place], (frozen, own))
    edit = nnx.merge(graphdef, shared, own).edit(weight, bias, jnp.float32)
    if which == "bias":
        return edit.bias.astype(dtype)
    return edited_weight(weight, edit, dtype)


def _merged(linear: Any, which: str, part: int, dtype: DTypeLike) -> jax.Array:
    place = np.unravel_index(part, declaration_of(linear.weight).stack_shape)
    graphdef, *states = nnx.split(linear.adapter, Shared, ...)
    return _merge(linear.frozen, states, place, graphdef, which, jnp.dtype(dtype))


def merged_weight(linear: Any, part: int, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Returns the edited weight of one layer (and expert), [out, in], rounded once to `dtype`.

    Args:
      linear: a bound projection with an adapter.
      part: flat index into the leading axes of the stack, [layers] or [layers, experts].
      dtype: dtype of the result.
    """
    return _merged(linear, "weight", part, dtype)


def _chosen_weight(linear: Projection, part: int, dtype: DTypeLike) -> jax.Array:
    place = np.unravel_index(part, declaration_of(linear.weight).stack_shape)
    return linear.chosen.merged(linear.frozen[0], place).astype(dtype)


def check_merges(method: Method) -> None:
    """Checks that the edits of a method can be merged into the weights.

    Raises:
      JaxtuneError: the method does not edit weights.
    """
    if not method.can_merge:
        raise JaxtuneError(
            f"an adapter of adapter.method={method.name} cannot be merged: it does not edit "
            "weights; keep it apart from the base: jaxtune export --format peft writes "
            f"{method.files}"
        )


def edits(model: CausalLM) -> dict[Path, WeightEdit]:
    """Returns, for every edited array of a bound model, a function that merges one layer of it.

    Raises:
      JaxtuneError: an edit adds a bias to a projection without one in this architecture.
    """
    # Trained rows of embedding and head replace rows; ESFT replaces whole experts; adapters edit.
    found: dict[Path, WeightEdit] = {}
    embedding = model.decoder.embed_tokens
    if embedding.adapter is not None:
        weight, merged = embedding.weight.get_value(), embedding.adapter.merged
        found[("model", "embed_tokens", "weight")] = lambda part, dtype: merged(weight, dtype)
    if model.lm_head is not None and model.lm_head_rows is not None:
        head, rows = model.lm_head.frozen[0], model.lm_head_rows
        found[("lm_head", "weight")] = lambda part, dtype: rows.merged(head, dtype)
    for path, linear in model.projections().items():
        if linear.chosen is not None:
            found[(*path, "weight")] = functools.partial(_chosen_weight, linear)
        if linear.adapter is None:
            continue
        found[(*path, "weight")] = functools.partial(merged_weight, linear)
        if not linear.adapter.edits_bias(linear):
            continue
        if linear.frozen[1] is None:
            raise JaxtuneError(
                f"{module_names(path, linear)[0]} has no bias in a "
                "model of this architecture, and the adapter adds one: it cannot be merged; keep "
                "it apart from the base: jaxtune export --format peft"
            )
        found[(*path, "bias")] = functools.partial(_merged, linear, "bias")
    return found
