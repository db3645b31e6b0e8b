"""Collectives of a step by formulas, for hardware without a compiler.

Weights, gradients and activations are sent as their shardings require:

- weights that are split along "fsdp" are gathered in the forward and the backward pass of every
  micro-batch, in the form in which they are stored (trained ones in the dtype of the computation;
  quantized ones a third time for the recomputation);
  the head is gathered once, and of the embedding only the rows of the tokens are sent;
- gradients of trained arrays are summed in float32 over the devices that share the batch;
- along "tensor" the outputs of projections whose inputs are split, and the gradients of the inputs
  of those whose outputs are, are summed;
- along "expert" the tokens of a mixture are gathered, and its outputs are summed and scattered;
- along "sequence" the keys and values of a layer are gathered.

benchmarks/collectives.py compares the sums with those of compiled programs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxtune.parallel.rules import RULES
from jaxtune.planning.arguments import by_kind, step_arguments
from jaxtune.planning.collectives import Collective
from jaxtune.training.setup import Setup

_EXPERTS = "['experts']"


def estimated_collectives(setup: Setup, mesh: Mapping[str, int] | None = None) -> list[Collective]:
    """Estimates the collectives of a step, with rings.

    Args:
      setup: set-up of the run, on any devices.
      mesh: devices along each mesh axis; those of the setup by default.
    """
    mesh = setup.mesh.shape if mesh is None else mesh
    trees = by_kind(step_arguments(setup))
    micro = setup.config.training.accumulation
    found = [
        *_gathered_weights(trees["base"], mesh, setup, None),
        *_gathered_weights(trees["trainable"], mesh, setup, setup.options.dtype.itemsize),
        *_summed_gradients(trees["trainable"], mesh, micro),
        *_activations(setup, mesh, micro),
    ]
    return [collective for collective in found if collective.sent]


def _gathered_weights(
    tree: Any, mesh: Mapping[str, int], setup: Setup, itemsize: int | None
) -> Iterator[Collective]:
    """Yields the gathers of the weights of a tree.

    Args:
      tree: arrays with shardings, of any shape.
      mesh: devices along each mesh axis.
      setup: set-up of the run.
      itemsize: bytes of a value that is sent; by default those of the arrays.
    """
    micro, again = setup.config.training.accumulation, setup.options.remat != "none"
    for path, array, axes in _arrays(tree, mesh):
        # Experts stay split along "expert" only.
        along = [axis for axis in axes if axis == "fsdp" or (axis == "tensor" and _EXPERTS in path)]
        if along and "embed_tokens" not in path:
            kept = math.prod(mesh[axis] for axis in axes if axis not in along)
            whole = array.size * (itemsize or array.dtype.itemsize) / kept
            passes = 1 if "lm_head" in path else 2
            # Recomputation and backward pass share the gather of a plain weight. Codes are gathered
            # for each of them, except for the last projection, which is not recomputed.
            if again and array.dtype.itemsize == 1 and "down_proj" not in path:
                passes += 1
            group = math.prod(mesh[axis] for axis in along)
            yield _gather(whole, group, passes * micro, array.dtype.name)


def _summed_gradients(tree: Any, mesh: Mapping[str, int], micro: int) -> Iterator[Collective]:
    """Yields the sums of gradients, in float32, over the devices that have parts of the batch."""
    for _, array, axes in _arrays(tree, mesh):
        size = 4 * array.size / math.prod(mesh[axis] for axis in axes)
        group = math.prod(mesh[axis] for axis in (*RULES["batch"], "sequence") if axis not in axes)
        if "fsdp" in axes:
            yield _scatter(size * mesh["fsdp"], mesh["fsdp"], micro)
        yield _sum(size, group, micro, "float32")


def _activations(setup: Setup, mesh: Mapping[str, int], micro: int) -> Iterator[Collective]:
    rows, length = setup.batch_like()["tokens"].shape
    split = math.prod(mesh[axis] for axis in (*RULES["batch"], "sequence"))
    tokens = rows // micro * length / split  # of a device, in a micro-batch
    again = setup.options.remat != "none"
    dtype, width = setup.options.dtype.name, setup.options.dtype.itemsize
    hidden, tensor = setup.definition.hidden_size, mesh["tensor"]
    yield _exchange(tokens * hidden * width, mesh["fsdp"], micro, dtype)  # rows of the embedding
    for path, leaf in setup.definition.in_checkpoint().items():
        declared = leaf.declaration
        if len(declared.shape) != 2 or declared.experts:
            continue
        (rows_out, columns), times = declared.shape, math.prod(declared.stack_shape) * micro
        out_axis, in_axis = (RULES[axis] if axis else () for axis in declared.axes)
        if "tensor" in out_axis and rows_out % tensor == 0:
            # Each device has the part of the inputs' gradient that its outputs contribute. It is
            # summed in float32, and for the embedding the outputs are.
            lookup = "embed_tokens" in path
            yield _sum(tokens * columns * (width if lookup else 4), tensor, times, "float32")
        if "tensor" in in_axis and columns % tensor == 0:
            repeated = again and "down_proj" not in path  # the last of a layer is not needed again
            yield _sum(tokens * rows_out * width, tensor, times * (1 + repeated), dtype)
    for blocks in setup.definition.blocks:
        yield from _exchanged_tokens(blocks, setup, mesh, tokens, blocks.count * micro)


def _exchanged_tokens(
    blocks: Any, setup: Setup, mesh: Mapping[str, int], tokens: float, times: int
) -> Iterator[Collective]:
    """Yields the exchanges between the parts of a sequence, and between experts, of a block."""
    dtype, width = setup.options.dtype.name, setup.options.dtype.itemsize
    again = setup.options.remat != "none"
    if blocks.layer.mixture is not None:
        # The sequence is split along "tensor" here.
        group = mesh["expert"]
        size = tokens / mesh["tensor"] * group * setup.definition.hidden_size * width
        yield _gather(size, group, times * (2 + again), dtype)
        yield _scatter(size, group, times * 2, dtype)  # of outputs and gradients, once each
    group, widths = mesh["sequence"], blocks.layer.activation_widths
    size = tokens * group * (widths["qkv"] - widths["out"]) / mesh["tensor"] * width
    yield _gather(size, group, times * (1 + again), dtype)
    yield _scatter(size, group, times, dtype)


def _arrays(tree: Any, mesh: Mapping[str, int]) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yields paths, arrays, and the mesh axes of more than one device that split them."""
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        axes: list[str] = []
        spec = (*array.sharding.spec, *[None] * array.ndim)
        for size, entry in zip(array.shape, spec, strict=False):
            names = (entry,) if isinstance(entry, str) else entry or ()
            if size % math.prod(mesh[name] for name in names) == 0:
                axes += [name for name in names if mesh[name] > 1]
        yield jax.tree_util.keystr(path), array, tuple(axes)


def _gather(size: float, group: int, times: float, dtype: str) -> Collective:
    """Returns the gather of an array of `size` bytes from all devices of a group."""
    return Collective("all-gather", dtype, times, round(size * (group - 1) / group), group)


def _exchange(size: float, group: int, times: float, dtype: str) -> Collective:
    """Returns the exchange of arrays of `size` bytes between all devices of a group."""
    return Collective("all-to-all", dtype, times, round(size * (group - 1) / group), group)


def _scatter(size: float, group: int, times: float, dtype: str = "float32") -> Collective:
    """Returns the sum of arrays of `size` bytes, of which each device keeps a part."""
    return Collective("reduce-scatter", dtype, times, round(size * (group - 1) / group), group)


def _sum(size: float, group: int, times: float, dtype: str) -> Collective:
    """Returns the sum of arrays of `size` bytes, of which each device keeps all."""
    return Collective("all-reduce", dtype, times, round(2 * size * (group - 1) / group), group)
