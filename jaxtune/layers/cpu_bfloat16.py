"""Stacked bfloat16 weights as uint16 arrays, for XLA's CPU backend.

That backend has no bfloat16 slice. For a loop over stacked layers it converts the whole stack to
float32 ahead of the loop and keeps the result. Slices of integers stay slices. On a CPU, stacks
therefore enter compiled functions as uint16 views of the same memory, and each layer's slice is
converted back to bfloat16:

1. `jit`, with which every function of a model's weights is compiled, replaces the arguments.
2. `decode`, in the body of the scan over layers, restores a layer's slices.

Stacks that are not arguments are sliced with `pick`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from jaxtune.layers.tree import flatten, unflatten

_STACKS = ("model", "layers")


class Compiled:
    """A compiled function of model trees, with the methods of `jax.stages.Compiled` in use."""

    def __init__(self, compiled: jax.stages.Compiled):
        self._compiled = compiled
        self.cost_analysis = compiled.cost_analysis

    def memory_analysis(self) -> Any:
        """Returns the compiler's memory figures, in bytes per device."""
        return self._compiled.memory_analysis()

    def as_text(self) -> str:
        """Returns the optimized program as text."""
        return self._compiled.as_text() or ""

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function with arrays of the shapes for which it was compiled."""
        return self._compiled(*_encode(arguments))


class Lowered:
    """A lowered function of model trees."""

    def __init__(self, lowered: jax.stages.Lowered):
        self._lowered = lowered

    def compile(self) -> Compiled:
        """Compiles the function."""
        return Compiled(self._lowered.compile())

    def as_text(self) -> str:
        """Returns the program as text."""
        return self._lowered.as_text()


class Jitted:
    """A function of model trees under `jax.jit`; see `jit`."""

    def __init__(self, function: Callable[..., Any], **options: Any):
        self._jitted = jax.jit(function, **options)

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Calls the function, compiling it on the first call with these shapes and dtypes."""
        return self._jitted(*_encode(arguments), **static)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        """Traces the function for arrays or ShapeDtypeStructs."""
        return self._jitted.trace(*_encode(arguments))

    def lower(self, *arguments: Any, **static: Any) -> Lowered:
        """Lowers the function for arrays or ShapeDtypeStructs."""
        return Lowered(self._jitted.lower(*_encode(arguments), **static))


def jit(function: Callable[..., Any], **options: Any) -> Jitted:
    """Compiles a function of model trees, as `jax.jit` does.

    Args:
      function: its positional arguments are arrays, pytrees, model trees (nested dicts by path) or
        tuples of these; keyword arguments are static.
      **options: those of `jax.jit`.
    """
    return Jitted(function, **options)


def decode(layer: Any) -> Any:
    """Returns a pytree of one layer's arrays with uint16 leaves as bfloat16; traceable."""
    return jax.tree.map(
        lambda a: lax.bitcast_convert_type(a, jnp.bfloat16) if a.dtype == jnp.uint16 else a, layer
    )


def stored_dtype(dtype: DTypeLike, platform: str) -> Any:
    """Returns the dtype in which a stack that a compiled function updates is held.

    Args:
      dtype: dtype of its values.
      platform: platform of the devices: "cpu", "gpu" or "tpu".
    """
    bfloat16 = platform == "cpu" and jnp.dtype(dtype) == jnp.bfloat16
    return jnp.dtype(jnp.uint16 if bfloat16 else dtype)


def pick(stack: jax.Array, index: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns `index(stack)`, a slice or gather of any shape; converts no bfloat16 stack."""
    if stack.dtype != jnp.bfloat16:
        return index(stack)
    return lax.bitcast_convert_type(
        index(lax.bitcast_convert_type(stack, jnp.uint16)), jnp.bfloat16
    )


def _encode(argument: Any) -> Any:
    """Replaces the bfloat16 stacks of model trees in arguments by uint16 views, on a CPU."""
    if type(argument) is tuple:
        return tuple(_encode(item) for item in argument)
    if not isinstance(argument, Mapping) or _STACKS[0] not in argument:
        return argument
    leaves = dict(flatten(argument))
    stacks = {p: jax.tree.map(_view, leaf) for p, leaf in leaves.items() if p[:2] == _STACKS}
    return unflatten(leaves | stacks)


def _view(leaf: Any) -> Any:
    # An abstract mesh stands for devices that are planned for, which are not CPUs.
    if leaf.dtype != jnp.bfloat16 or isinstance(getattr(leaf.sharding, "mesh", None), AbstractMesh):
        return leaf
    if next(iter(leaf.sharding.device_set)).platform != "cpu":
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.uint16, sharding=leaf.sharding)
    # NumPy's views share the memory of the arrays, and device_put on a CPU does not copy them.
    shards = [
        jax.device_put(np.asarray(shard.data).view(np.uint16), shard.device)
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
