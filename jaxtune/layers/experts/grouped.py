"""Grouped products: many rows, each multiplied with the weight of its own expert.

Rows are sorted by expert, and the rows of each expert are padded to a multiple of a tile, so that
all rows of a tile have the same weight. Products visit only tiles with rows: the cost grows with
the number of rows and not with that of experts, and no row is dropped.

Products are loops over tiles on any platform, the kernels of `grouped_pallas` on TPUs, or those of
`grouped_triton` on NVIDIA GPUs. A loop dequantizes the weight of one expert at a time and never
holds a dequantized stack.

Tiles of 4 rows for experts 0 to 2 with 5, 0 and 2 rows (tiles = 3):

    tile 0   0 0 0 0     tile_expert 0
    tile 1   0 · · ·     tile_expert 0
    tile 2   2 2 · ·     tile_expert 2
    tile 3, tile 4       without rows

The number of tiles is static, ⌈N / tile⌉ + E, the worst case of E tiles that are not full; how many
of them hold rows (`tiles`) is known at run time only, hence the loops with dynamic trips. Where
some experts are trained in place of frozen ones (`Replaced`), two such loops visit disjoint sets of
tiles: those of frozen experts, and those of trained ones; see `_walks`.

N rows routed, P padded rows, E experts, K trained in place of frozen ones.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jaxtune.layers.cpu_bfloat16 import pick
from jaxtune.layers.experts import grouped_pallas, grouped_triton
from jaxtune.layers.linear import is_trained, outer, plain_values, product
from jaxtune.quant import materialize

logger = logging.getLogger(__name__)

MAX_TILE = 128
# Rows of the smallest tile: a TPU stores bfloat16 in tiles of 16 rows, and the tensor cores of a
# GPU multiply 16 rows at a time.
MIN_TILE = {"loop": 8, "pallas": 16, "triton": 16}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "slot", "tile_expert", "tiles"],
    meta_fields=["tile", "kernel"],
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """The layout of routed rows in tiles.

    Attributes:
      source: int32[P], the row that each padded row holds; N for padding.
      slot: int32[N], the padded row of each row; P for a row without an expert.
      tile_expert: int32[P / tile], the expert of each tile.
      tiles: int32 scalar, number of tiles with rows: at most ⌈N / tile⌉ + E.
      tile: rows per tile.
      kernel: implementation for plain weights: "loop", "pallas" (TPU) or "triton" (GPU).
    """

    source: jax.Array
    slot: jax.Array
    tile_expert: jax.Array
    tiles: jax.Array
    tile: int
    kernel: str


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


class Replaced(NamedTuple):
    """Weights of experts, some of which are trained in place of frozen ones.

    Attributes:
      frozen: [E, out, in], plain or quantized; weights of replaced experts are never read.
      trained: [K, out, in].
      slot: int32[E], the index in `trained` of each expert; -1 for a frozen one.
    """

    frozen: Any
    trained: jax.Array
    slot: jax.Array


def choose_kernel(platform: str) -> str:
    """Returns the fastest kernel for a platform and the mesh in context.

    An accelerator without its kernel is logged once, with the reason.
    """
    kernel = {"tpu": "pallas", "gpu": "triton", "cuda": "triton"}.get(platform, "loop")
    mesh = jax.sharding.get_abstract_mesh()
    if kernel == "loop":
        return kernel
    # The compiler partitions loops, but not kernels.
    alone = mesh.empty or mesh.size == 1 or all(kind is AxisType.Manual for kind in mesh.axis_types)
    lacking = None if alone else f"the mesh has {mesh.size} devices"
    if lacking is None and kernel == "triton":
        lacking = _gpu_lacks()
    if lacking is None:
        return kernel
    _log_once(f"routed experts: a loop instead of the {platform} kernel: {lacking}")
    return "loop"


def _gpu_lacks() -> str | None:
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:  # compiling for a described GPU, which Pallas assumes to be a Hopper
        return grouped_triton.unsupported("9.0")
    return grouped_triton.unsupported(getattr(device, "compute_capability", None))


def tile_size(rows: int, experts: int, kernel: str = "loop") -> int:
    """Returns the rows per tile, a power of two; an average expert fills a few tiles."""
    average = max(rows // (4 * experts), 1)
    return min(MAX_TILE, max(MIN_TILE[kernel], 1 << (average.bit_length() - 1)))


def group(expert: jax.Array, experts: int, kernel: str = "loop") -> Groups:
    """Sorts rows into tiles.

    A stable sort orders the rows by expert. Within the sorted rows, expert e owns `sizes[e]` rows
    from `first_row[e]` on; in the padded layout it owns `tiles[e]` whole tiles from padded row
    `first_slot[e]` on. A row's slot is therefore `first_slot` of its expert plus its rank among the
    expert's rows. Rows without an expert sort to the end and get the slot P, out of range.

    Args:
      expert: int32[N], the expert of each row; E for a row without one.
      experts: E.
      kernel: kernel of the following products; see `choose_kernel`.
    """
    rows = expert.shape[0]
    tile = tile_size(rows, experts, kernel)
    padded = (-(-rows // tile) + experts) * tile
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=experts)
    tiles = -(-sizes // tile)
    last_tile = jnp.cumsum(tiles)
    first_row, first_slot = jnp.cumsum(sizes) - sizes, (last_tile - tiles) * tile
    ordered = expert[order]
    slots = first_slot[ordered] + jnp.arange(rows) - first_row[ordered]
    slots = jnp.where(ordered < experts, slots, padded).astype(jnp.int32)
    # The expert of a tile is the first whose cumulative number of tiles exceeds the tile's index.
    tile_expert = jnp.searchsorted(last_tile, jnp.arange(padded // tile), side="right")
    return Groups(
        source=jnp.full(padded, rows, jnp.int32).at[slots].set(order.astype(jnp.int32)),
        slot=jnp.zeros(rows, jnp.int32).at[order].set(slots),
        tile_expert=jnp.minimum(tile_expert, experts - 1).astype(jnp.int32),
        tiles=last_tile[-1].astype(jnp.int32),
        tile=tile,
        kernel=kernel,
    )


def _take(weight: Any, expert: jax.Array, dtype: Any) -> jax.Array:
    """Returns one expert's weight [out, in], as an array of `dtype`."""

    def index(leaf: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(leaf, expert, 0, keepdims=False)

    return materialize(jax.tree.map(lambda leaf: pick(leaf, index), weight), dtype)


class _Walk(NamedTuple):
    """A loop over the tiles that multiply with one stack of weights.

    Trip i, for i below `count`, multiplies tile `tiles[i]` with `weights[owner[tiles[i]]]`.

    Attributes:
      weights: the stack.
      tiles: int32[P / tile], a permutation of the tiles: first those of this loop.
      count: int32 scalar, number of tiles of this loop.
      owner: int32[P / tile], index of each tile's weight in the stack.
    """

    weights: Any
    tiles: jax.Array
    count: jax.Array
    owner: jax.Array


def _walks(weight: Any, groups: Groups) -> list[_Walk]:
    """Returns loops that visit each tile with rows once, the last over what may be trained."""
    index = jnp.arange(groups.tile_expert.shape[0])
    if not isinstance(weight, Replaced):
        return [_Walk(weight, index, groups.tiles, groups.tile_expert)]
    slot = weight.slot[groups.tile_expert]

    # A stable argsort of a boolean moves the chosen tiles to the front and keeps their order.
    def over(chosen: jax.Array, weights: Any, owner: jax.Array) -> _Walk:
        chosen = chosen & (index < groups.tiles)
        return _Walk(weights, jnp.argsort(~chosen, stable=True), jnp.sum(chosen), owner)

    frozen = over(slot < 0, weight.frozen, groups.tile_expert)
    return [frozen, over(slot >= 0, weight.trained, slot)]


def _multiply(
    x: jax.Array, weight: Any, groups: Groups, axis: int, features: int, dtype: DTypeLike
) -> jax.Array:
    """Contracts the last axis of x [P, …] with an axis of each tile's weight, summed in float32."""
    tile, where = groups.tile, (groups.tile_expert, groups.tiles)
    if groups.kernel == "triton" and isinstance(weight, jax.Array):
        return grouped_triton.multiply(x, weight, *where, axis, dtype)
    if groups.kernel == "pallas" and isinstance(weight, jax.Array):
        return grouped_pallas.multiply(x, weight, *where, axis).astype(dtype)

    def one_tile(walk: _Walk, index: jax.Array, y: jax.Array) -> jax.Array:
        at = walk.tiles[index]
        rows = lax.dynamic_slice_in_dim(x, at * tile, tile)
        w = _take(walk.weights, walk.owner[at], x.dtype)
        return lax.dynamic_update_slice_in_dim(y, product(rows, w, axis), at * tile, 0)

    y = jnp.zeros((x.shape[0], features), jnp.float32)
    for walk in _walks(weight, groups):
        y = lax.fori_loop(0, walk.count, functools.partial(one_tile, walk), y)
    return y.astype(dtype)


def grouped_linear(x: jax.Array, weight: Any, groups: Groups, features: int) -> jax.Array:
    """Multiplies each padded row with the weight of its expert.

    Args:
      x: [P, in], in the compute dtype.
      weight: [E, out, in], plain or quantized, frozen or trained, or `Replaced`.
      groups: from `group`.
      features: out.

    Returns:
      float32 [P, out]; zero in tiles without rows.
    """
    return _grouped(x, weight, groups, features)


def _primal(x: jax.Array, weight: Any, groups: Groups, features: int) -> jax.Array:
    return _multiply(x, weight, groups, 1, features, jnp.float32)


def _forward(x: Any, weight: Any, groups: Any, features: int) -> tuple[jax.Array, Any]:
    trained = is_trained(weight)
    x, weight, groups = plain_values((x, weight, groups))
    like = jnp.zeros((0, x.shape[1]), x.dtype)
    y = _multiply(x, weight, groups, 1, features, jnp.float32)
    return y, (x if trained else None, weight, groups, like)


def _backward(features: int, residuals: Any, g: jax.Array) -> Any:
    x, weight, groups, like = residuals
    g = g.astype(like.dtype)
    dx = _multiply(g, weight, groups, 0, like.shape[1], like.dtype)
    if x is None:
        return dx, None, None
    dw = _outer_sums(g, x, weight, groups)
    if isinstance(weight, Replaced):
        return dx, Replaced(None, dw, None), None  # type: ignore[arg-type]
    return dx, dw, None


def _outer_sums(g: jax.Array, x: jax.Array, weight: Any, groups: Groups) -> jax.Array:
    """Sums g [P, out] ⊗ x [P, in] over the rows of each trained expert: [E or K, out, in]."""
    tile, where = groups.tile, (groups.tile_expert, groups.tiles)
    if groups.kernel != "loop" and not isinstance(weight, Replaced):
        experts = weight.shape[0]
        if groups.kernel == "triton":
            return grouped_triton.outer_sums(g, x, *where, experts, weight.dtype)
        return grouped_pallas.outer_sums(g, x, *where, experts).astype(weight.dtype)
    walk = _walks(weight, groups)[-1]

    def one_tile(index: jax.Array, dw: jax.Array) -> jax.Array:
        at = walk.tiles[index]
        rows, grads = (lax.dynamic_slice_in_dim(a, at * tile, tile) for a in (x, g))
        owner = walk.owner[at]
        total = lax.dynamic_index_in_dim(dw, owner, 0, keepdims=False) + outer(grads, rows)
        return lax.dynamic_update_index_in_dim(dw, total, owner, 0)

    dw = lax.fori_loop(0, walk.count, one_tile, jnp.zeros(walk.weights.shape, jnp.float32))
    return dw.astype(walk.weights.dtype)


_grouped: Any = jax.custom_vjp(_primal, nondiff_argnums=(3,))
_grouped.defvjp(_forward, _backward, symbolic_zeros=True)
