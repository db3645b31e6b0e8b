"""Grouped products equal a dense einsum, and compute few tiles beyond the ideal."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouping import BFLOAT16, EXPERTS, FLOAT32, IN, OUT, ours, relative, routes
from jax.experimental.pallas import tpu as pltpu

from jaxtune.layers.experts import grouped_pallas
from jaxtune.layers.experts.grouped import MAX_TILE, Replaced, group, grouped_linear, tile_size
from jaxtune.quant.int8 import Int8
from jaxtune.quant.weight import QuantizedWeight

pytestmark = pytest.mark.usefixtures("compiled_fully")


def dense(x, weight, expert):
    """The same, with every expert's product of every row."""
    one_hot = jax.nn.one_hot(expert, weight.shape[0], dtype=jnp.float32)
    return jnp.einsum(
        "ni,eoi,ne->no",
        x.astype(jnp.float32),
        weight.astype(jnp.float32),
        one_hot,
        precision="highest",
    )


@pytest.mark.parametrize(
    "kind",
    [
        "even",
        "random",
        "one-takes-all",
        "the-last-takes-all",
        "the-first-is-empty",
        "most-are-empty",
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [1, 61, 768])
def test_products_and_gradients_are_those_of_an_einsum(kind, dtype, rows):
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight, g = (
        jax.random.normal(key, shape).astype(dtype)
        for key, shape in zip(keys, [(rows, IN), (EXPERTS, OUT, IN), (rows, OUT)], strict=True)
    )
    expert = jnp.asarray(routes(kind, rows))
    bar = FLOAT32 if dtype == jnp.float32 else BFLOAT16

    def results(function):
        y, pull = jax.vjp(lambda x, weight: function(x, weight, expert), x, weight)
        return y, *pull(g.astype(jnp.float32))

    y, dx, dw = jax.jit(lambda: results(ours))()
    expected_y, expected_dx, expected_dw = results(dense)
    assert y.dtype == jnp.float32
    assert (dx.dtype, dw.dtype) == (dtype, dtype)
    # The product itself is not rounded: bfloat16 operands have exact products in float32.
    assert relative(y, expected_y) <= FLOAT32
    assert relative(dx, expected_dx) <= bar
    assert relative(dw, expected_dw) <= bar
    empty = np.setdiff1d(np.arange(EXPERTS), expert)
    assert not np.any(np.asarray(dw, np.float32)[empty])


@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [
        ("random", jnp.float32, 1),
        ("random", jnp.float32, 768),
        ("random", jnp.bfloat16, 768),
        ("most-are-empty", jnp.float32, 61),
        ("the-last-takes-all", jnp.float32, 61),
        ("the-first-is-empty", jnp.bfloat16, 61),
    ],
)
def test_the_kernels_of_a_tpu_do_what_the_loop_does(kind, dtype, rows, monkeypatch):
    # Two blocks of a weight and of its gradient, the last of which reach beyond the end.
    monkeypatch.setattr(grouped_pallas, "WEIGHT_BLOCK", 1)
    monkeypatch.setattr(grouped_pallas, "GRADIENT_BLOCK", 128)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(rows, 200), (EXPERTS, 136, 200), (rows, 136)]
    x, weight, g = (
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    expert = jnp.asarray(routes(kind, rows))

    def results(kernel):
        y, pull = jax.vjp(lambda x, weight: ours(x, weight, expert, kernel), x, weight)
        return y, *pull(g.astype(jnp.float32))

    expected = jax.jit(lambda: results("loop"))()
    with pltpu.force_tpu_interpret_mode():  # what nothing has written reads as NaN
        values = jax.jit(lambda: results("pallas"))()
    for value, other in zip(values, expected, strict=True):
        assert value.dtype == other.dtype
        assert relative(value, other) <= (FLOAT32 if value.dtype == jnp.float32 else BFLOAT16)


@pytest.mark.parametrize("kernel", ["loop", "pallas", "triton"])
def test_a_quantized_stack_is_never_dequantized_whole(kernel):
    keys = jax.random.split(jax.random.key(2), 3)
    parts = {
        "codes": jax.random.randint(keys[0], (EXPERTS, OUT, IN), -127, 128, jnp.int8),
        "absmax": jnp.abs(jax.random.normal(keys[1], (EXPERTS, OUT))),
    }
    weight = QuantizedWeight(parts, Int8(), (OUT, IN), (None, None))
    x, expert = jax.random.normal(keys[2], (61, IN)), jnp.asarray(routes("random", 61))
    groups = group(expert, EXPERTS, kernel)
    padded = jnp.pad(x, ((0, 1), (0, 0)))[groups.source]

    def total(padded, multiplied, groups=groups):
        return jnp.sum(jnp.sin(grouped_linear(padded, multiplied, groups, OUT)[groups.slot]))

    compiled = jax.jit(jax.grad(total)).lower(padded, weight).compile()
    by_loop = dataclasses.replace(groups, kernel="loop")
    expected = jax.grad(total)(padded, weight.dequantize(jnp.float32), by_loop)
    assert relative(compiled(padded, weight), expected) <= FLOAT32
    assert f"f32[{EXPERTS},{OUT},{IN}]" not in compiled.as_text()


@pytest.mark.parametrize("kernel", ["loop", "pallas"])
@pytest.mark.parametrize("chosen", [(1, 4, 5), (3,), ()])
def test_trained_experts_take_the_place_of_frozen_ones(chosen, kernel):
    keys = jax.random.split(jax.random.key(3), 3)
    frozen = jax.random.normal(keys[0], (EXPERTS, OUT, IN))
    trained = jax.random.normal(keys[1], (len(chosen) + 1, OUT, IN))  # the last one pads
    x, expert = jax.random.normal(keys[2], (61, IN)), jnp.asarray(routes("random", 61))
    rows = jnp.asarray(chosen, jnp.int32)
    slot = jnp.full(EXPERTS, -1, jnp.int32).at[rows].set(jnp.arange(len(chosen)))
    # What a replaced expert was is never read.
    weight = Replaced(frozen.at[rows].set(jnp.nan), trained, slot)
    groups = group(expert, EXPERTS, kernel)

    def total(trained, x):
        padded = jnp.pad(x, ((0, 1), (0, 0)))[groups.source]
        y = grouped_linear(padded, weight._replace(trained=trained), groups, OUT)[groups.slot]
        return jnp.sum(jnp.sin(y)), y

    def expected(trained, x):
        y = dense(x, frozen.at[rows].set(trained[: len(chosen)]), expert)
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(trained, x)
    others, other = jax.grad(expected, argnums=(0, 1), has_aux=True)(trained, x)
    assert relative(y, other) <= FLOAT32
    assert relative(gradients[1], others[1]) <= FLOAT32
    assert np.max(np.abs(gradients[0] - others[0])) <= FLOAT32 * np.max(np.abs(others[1]) + 1)
    assert not np.any(gradients[0][len(chosen) :])


def test_a_frozen_weight_gets_the_same_gradient_of_its_input():
    keys = jax.random.split(jax.random.key(1), 2)
    x = jax.random.normal(keys[0], (61, IN))
    weight = jax.random.normal(keys[1], (EXPERTS, OUT, IN))
    expert = jnp.asarray(routes("random", 61))
    dx = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(ours(x, weight, expert)))))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(dense(x, weight, expert))))(x)
    assert relative(dx, expected) <= FLOAT32


@pytest.mark.parametrize("experts", [1, 8, 64, 256])
@pytest.mark.parametrize("rows", [1, 7, 100, 4096, 4 * MAX_TILE * 64])
def test_few_tiles_are_computed_beyond_the_ideal(rows, experts):
    for kind in ("even", "random", "one-takes-all"):
        expert = routes(kind, rows, experts)
        groups = group(jnp.asarray(expert), experts)
        ideal = -(-rows // groups.tile)
        assert ideal <= int(groups.tiles) <= ideal + experts, kind
        assert groups.tile == tile_size(rows, experts) <= MAX_TILE
        # Each row has a place of its own, in a tile of its expert that is computed.
        slot = np.asarray(groups.slot)
        assert len(set(slot)) == rows
        assert (np.asarray(groups.source)[slot] == np.arange(rows)).all()
        assert (np.asarray(groups.tile_expert)[slot // groups.tile] == expert).all()
        assert slot.max() < int(groups.tiles) * groups.tile
        assert (np.asarray(groups.source) < rows).sum() == rows


def test_full_tiles_where_every_expert_has_four():
    assert tile_size(4 * MAX_TILE * 64, 64) == tile_size(4 * MAX_TILE * 64, 8) == MAX_TILE


def test_rows_of_tiles_that_hold_nothing_are_zero():
    expert = jnp.asarray(routes("one-takes-all", 61))
    groups = group(expert, EXPERTS)
    y = grouped_linear(
        jnp.ones((groups.source.shape[0], IN)), jnp.ones((EXPERTS, OUT, IN)), groups, OUT
    )
    computed = int(groups.tiles) * groups.tile
    assert computed < y.shape[0]
    assert (np.asarray(y[:computed]) == IN).all()
    assert not np.any(y[computed:])
