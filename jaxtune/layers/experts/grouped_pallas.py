"""Grouped products as Pallas kernels for TPUs.

All rows of a tile have the same weight: the kernel multiplies each tile with the weight of its
expert. The grid runs over blocks of output features, and within these over tiles. Since tiles are
sorted by expert, successive steps ask for the same block of the weight, which then stays in VMEM.
`tile_expert` and `tiles` are prefetched scalars: the index maps of the blocks read them to find the
weight of a tile before its step begins. Operands are plain arrays: a quantized stack would have to
be dequantized whole.

P padded rows, E experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxtune.layers.linear import outer, product

# Bytes of a block of a weight; VMEM holds two of them in addition to the rows.
WEIGHT_BLOCK = 4 * 2**20
# Rows and columns of a block of a gradient, float32.
GRADIENT_BLOCK = 512
LANES = 128


def features_per_block(contracted: int, features: int, itemsize: int) -> int:
    """Returns the features per block of a weight, at least one lane of them.

    Args:
      contracted: length of the contracted axis, which is not split.
      features: number of output features.
      itemsize: size of a value in bytes.
    """
    return min(features, max(WEIGHT_BLOCK // (contracted * itemsize) // LANES, 1) * LANES)


def _cost(products: int, *operands: jax.Array) -> pl.CostEstimate:
    """Returns the cost of a kernel, which the compiler cannot derive."""
    read = sum(operand.size * operand.dtype.itemsize for operand in operands)
    return pl.CostEstimate(flops=2 * products, bytes_accessed=read, transcendentals=0)


def multiply(
    x: jax.Array, weight: jax.Array, tile_expert: jax.Array, tiles: jax.Array, axis: int
) -> jax.Array:
    """Contracts the last axis of x with an axis of the weight of each tile's expert.

    Args:
      x: [P, …].
      weight: [E, out, in].
      tile_expert: int32[P / tile].
      tiles: int32 scalar, number of tiles with rows.
      axis: contracted axis of one expert's weight: 1 for in, 0 for out.

    Returns:
      float32 [P, features]; zero in tiles without rows.
    """
    (rows, contracted), features = x.shape, weight.shape[2 - axis]
    tile = rows // tile_expert.shape[0]
    columns = features_per_block(contracted, features, x.dtype.itemsize)

    def kernel(expert: Any, tiles: Any, x: Any, weight: Any, y: Any) -> None:
        holds = pl.program_id(1) < tiles[0]

        @pl.when(holds)
        def _multiply() -> None:
            y[...] = product(x[...], weight[...], axis)

        @pl.when(~holds)
        def _clear() -> None:
            y[...] = jnp.zeros_like(y)

    # Block indices in [E, out, in] for tile i: its expert's weight, cut along the output features.
    def weight_block(column: Any, i: Any, expert: Any, tiles: Any) -> tuple[Any, ...]:
        return (expert[i], column, 0) if axis == 1 else (expert[i], 0, column)

    block = (columns, contracted) if axis == 1 else (contracted, columns)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, features), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(features, columns), tile_expert.shape[0]),
            in_specs=[
                pl.BlockSpec((tile, contracted), lambda column, i, expert, tiles: (i, 0)),
                pl.BlockSpec((None, *block), weight_block),
            ],
            out_specs=pl.BlockSpec((tile, columns), lambda column, i, expert, tiles: (i, column)),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(rows * contracted * features, x, weight),
        name="grouped_multiply",
    )(tile_expert, tiles[None], x, weight.astype(x.dtype))


def outer_sums(
    g: jax.Array, x: jax.Array, tile_expert: jax.Array, tiles: jax.Array, experts: int
) -> jax.Array:
    """Sums g ⊗ x over the rows of each expert.

    Args:
      g: [P, out].
      x: [P, in].
      tile_expert: int32[P / tile], ascending.
      tiles: int32 scalar, number of tiles with rows.
      experts: E.

    Returns:
      float32 [E, out, in].
    """
    count, (rows, out), features = tile_expert.shape[0], g.shape, x.shape[1]
    tile = rows // count
    height, width = min(GRADIENT_BLOCK, out), min(GRADIENT_BLOCK, features)

    def kernel(expert: Any, tiles: Any, g: Any, x: Any, total: Any) -> None:
        # Tiles are the innermost axis of the grid, so the block of an expert's sum stays in VMEM
        # while its tiles are added; the first of them overwrites what is there.
        i = pl.program_id(2)
        first = (i == 0) | (expert[i] != expert[jnp.maximum(i - 1, 0)])

        @pl.when((i < tiles[0]) & first)
        def _begin() -> None:
            total[...] = outer(g[...], x[...])

        @pl.when((i < tiles[0]) & ~first)
        def _add() -> None:
            total[...] += outer(g[...], x[...])

    total = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((experts, out, features), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(out, height), pl.cdiv(features, width), count),
            in_specs=[
                pl.BlockSpec((tile, height), lambda row, column, i, expert, tiles: (i, row)),
                pl.BlockSpec((tile, width), lambda row, column, i, expert, tiles: (i, column)),
            ],
            out_specs=pl.BlockSpec(
                (None, height, width),
                lambda row, column, i, expert, tiles: (expert[i], row, column),
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(rows * out * features, g, x),
        name="grouped_outer_sums",
    )(tile_expert, tiles[None], g, x)
    # No tile has written the blocks of experts without rows, so their content is undefined.
    held = jnp.arange(count) < tiles
    chosen = jnp.zeros(experts, bool).at[tile_expert].max(held)
    return jnp.where(chosen[:, None, None], total, 0.0)
