"""Grouped products as Pallas kernels for NVIDIA GPUs, compiled by Triton.

All rows of a tile have the same weight: a program multiplies a tile with a block of it. For
gradients a program sums over the tiles of one expert. Each program writes its own block exactly
once, so every element is written and no atomic additions are needed. Operands are plain arrays: a
quantized stack would have to be dequantized whole.

P padded rows, E experts.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from jaxtune.layers.linear import outer, product

try:
    # A jaxlib may be built without Triton.
    from jax.experimental.pallas import triton
except ImportError:
    triton: Any = None

# The largest block of output features, and the smallest for tensor cores.
FEATURES_BLOCK, SMALLEST_BLOCK = 128, 16
# Bytes of a block along the contracted axis: one swizzled row of shared memory. Three pipeline
# stages of two such blocks with 128 rows take 96 KiB, which all GPUs since Ampere have.
SUMMED_BYTES = 128
# Tensor cores multiply bfloat16 from this compute capability (Ampere) on.
LEAST_CAPABILITY = 8.0
# Whether kernels are interpreted, as tests do on a CPU.
INTERPRET = False


def unsupported(compute_capability: str | None) -> str | None:
    """Returns why a GPU cannot run these kernels, or None if it can.

    Args:
      compute_capability: the device's, such as "9.0"; a name such as "gfx942" for other vendors.
    """
    if triton is None:
        return "this jaxlib has no Triton"
    if not re.fullmatch(r"\d+\.\d+", compute_capability or ""):
        return f"the GPU ({compute_capability}) is not NVIDIA's"
    if float(compute_capability or 0) < LEAST_CAPABILITY:
        return f"the GPU has compute capability {compute_capability}, below {LEAST_CAPABILITY}"
    return None


def _block(features: int, largest: int) -> int:
    """Returns the size of a block: the power of two from `features` on, within the limits."""
    return min(max(1 << (features - 1).bit_length(), SMALLEST_BLOCK), largest)


def _within(ref: Any, place: tuple[Any, ...]) -> jax.Array | None:
    """Returns the mask of a block's elements that lie within the array; None if all do.

    Args:
      ref: the array.
      place: a scalar or a slice for each of its axes. Slices start at multiples of their size.
    """
    blocks = [(s, n) for s, n in zip(place, ref.shape, strict=True) if isinstance(s, pl.Slice)]
    shape = tuple(s.size for s, _ in blocks)
    masks = [
        lax.broadcasted_iota(jnp.int32, shape, axis) + s.start < n
        for axis, (s, n) in enumerate(blocks)
        if n % s.size
    ]
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _load(ref: Any, *place: Any) -> jax.Array:
    """Loads a block, with zeros beyond the end of the array."""
    mask = _within(ref, place)
    return triton.load(ref.at[place], mask=mask, other=None if mask is None else 0.0)


def _store(ref: Any, value: jax.Array, *place: Any) -> None:
    """Stores the elements of a block that lie within the array, in its dtype."""
    triton.store(ref.at[place], value.astype(ref.dtype), mask=_within(ref, place))


def _call(kernel: Any, grid: tuple[int, ...], result: jax.ShapeDtypeStruct, rows: int) -> Any:
    """Wraps a kernel whose operands are whole arrays, for accumulators with `rows` rows."""
    return pl.pallas_call(
        kernel,
        out_shape=result,
        grid=grid,
        # The accumulator of a square block would fill the registers of four warps.
        compiler_params=triton.CompilerParams(num_warps=8 if rows == FEATURES_BLOCK else 4),
        interpret=INTERPRET,
    )


def multiply(
    x: jax.Array,
    weight: jax.Array,
    tile_expert: jax.Array,
    tiles: jax.Array,
    axis: int,
    dtype: DTypeLike,
) -> jax.Array:
    """Contracts the last axis of x with an axis of the weight of each tile's expert.

    Args:
      x: [P, …].
      weight: [E, out, in]; its blocks are cast to the dtype of x.
      tile_expert: int32[P / tile].
      tiles: int32 scalar, number of tiles with rows.
      axis: contracted axis of one expert's weight: 1 for in, 0 for out.
      dtype: dtype of the result. Sums are float32 and rounded once.

    Returns:
      [P, features]; zero in tiles without rows.
    """
    (rows, contracted), features = x.shape, weight.shape[2 - axis]
    tile = rows // tile_expert.shape[0]
    itemsize = max(x.dtype.itemsize, weight.dtype.itemsize)
    width, depth = _block(features, FEATURES_BLOCK), _block(contracted, SUMMED_BYTES // itemsize)

    def grouped_multiply(expert: Any, tiles: Any, x: Any, weight: Any, y: Any) -> None:
        index = pl.program_id(1)
        chosen, mine = expert[index], pl.ds(index * tile, tile)
        columns = pl.ds(pl.program_id(0) * width, width)

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            summed = pl.ds(step * depth, depth)
            place = (columns, summed) if axis == 1 else (summed, columns)
            w = _load(weight, chosen, *place).astype(x.dtype)
            return total + product(_load(x, mine, summed), w, axis)

        # Zero steps for a tile without rows. A product instead of jnp.where, whose integer literals
        # have another type in Pallas.
        steps = pl.cdiv(contracted, depth) * (index < tiles[0]).astype(jnp.int32)
        total = lax.fori_loop(0, steps, add, jnp.zeros((tile, width), jnp.float32))
        _store(y, total, mine, columns)

    # Consecutive programs share the rows, then the expert, whose weight stays in the L2 cache.
    grid = (pl.cdiv(features, width), tile_expert.shape[0])
    result = jax.ShapeDtypeStruct((rows, features), dtype)
    return _call(grouped_multiply, grid, result, tile)(tile_expert, tiles[None], x, weight)


def outer_sums(
    g: jax.Array,
    x: jax.Array,
    tile_expert: jax.Array,
    tiles: jax.Array,
    experts: int,
    dtype: DTypeLike,
) -> jax.Array:
    """Sums g ⊗ x over the rows of each expert.

    Args:
      g: [P, out].
      x: [P, in].
      tile_expert: int32[P / tile], ascending.
      tiles: int32 scalar, number of tiles with rows.
      experts: E.
      dtype: dtype of the result. Sums are float32 and rounded once.

    Returns:
      [E, out, in]; zero for experts without rows.
    """
    count, (rows, out), features = tile_expert.shape[0], g.shape, x.shape[1]
    tile = rows // count
    height, width = _block(out, FEATURES_BLOCK), _block(features, FEATURES_BLOCK)
    depth = min(tile, SUMMED_BYTES // x.dtype.itemsize)
    # Number of tiles with rows of each expert, and its first tile.
    held = (jnp.arange(count) < tiles).astype(jnp.int32)
    sizes = jnp.zeros(experts, jnp.int32).at[tile_expert].add(held)
    first = jnp.cumsum(sizes, dtype=jnp.int32) - sizes

    def grouped_outer_sums(first: Any, sizes: Any, g: Any, x: Any, total: Any) -> None:
        expert = pl.program_id(2)
        outputs = pl.ds(pl.program_id(1) * height, height)
        inputs = pl.ds(pl.program_id(0) * width, width)
        start = first[expert] * (tile // depth)

        def add(step: jax.Array, total: jax.Array) -> jax.Array:
            summed = pl.ds((start + step) * depth, depth)
            return total + outer(_load(g, summed, outputs), _load(x, summed, inputs))

        steps = sizes[expert] * (tile // depth)
        sums = lax.fori_loop(0, steps, add, jnp.zeros((height, width), jnp.float32))
        _store(total, sums, expert, outputs, inputs)

    grid = (pl.cdiv(features, width), pl.cdiv(out, height), experts)
    result = jax.ShapeDtypeStruct((experts, out, features), dtype)
    return _call(grouped_outer_sums, grid, result, height)(first, sizes, g, x)
