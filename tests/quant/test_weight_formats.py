"""Requirements on every weight format, and the error bound of each."""

import bitsandbytes  # noqa: F401 – registers its operators with torch
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from jax import lax

from jaxtune.layers.experts.grouped import group, grouped_linear
from jaxtune.layers.linear import linear_float32, outer, product
from jaxtune.quant import Format
from jaxtune.quant.fp8 import Float8
from jaxtune.quant.int4 import Int4
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import NormalFloat4
from jaxtune.quant.weight import QuantizedWeight

FORMATS = {
    "nf4": NormalFloat4(),
    "nf4, plain scales": NormalFloat4(double=False),
    "int4": Int4(),
    "int4, asymmetric": Int4(symmetric=False),
    "int4, groups of 32": Int4(group_size=32),
    "int4, per channel": Int4(group_size=0),
    "int8": Int8(),
    "fp8": Float8(),
    "fp8, small blocks": Float8(block=(16, 32)),
}
SHAPES = [(48, 128), (200, 192), (7, 100), (130, 65)]
# One product in float32 is what the two computations share; sums in another order differ by this.
SAME = 1e-6

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES)


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantize(form: Format, weight) -> QuantizedWeight:
    parts = form.finish(jax.tree.map(np.asarray, jax.jit(form.encode)(jnp.asarray(weight))))
    return QuantizedWeight(jax.tree.map(jnp.asarray, parts), form, weight.shape, ("mlp", "embed"))


@every_format
@every_shape
def test_parts_have_the_shapes_and_dtypes_of_the_format(form, shape):
    quantized, specified = quantize(form, draw(shape)), form.parts(shape)
    assert set(quantized.parts) == set(specified)
    for name, part in specified.items():
        value = quantized.parts[name]
        assert value.shape == part.shape and value.dtype == part.dtype, name
        assert len(part.axes) == value.ndim
    assert form.nbytes(shape) == sum(value.nbytes for value in quantized.parts.values())
    assert quantized.shape == shape


# Of a group's largest magnitude: half a step of the widest gap between codes, and the rounding of
# a scale to bfloat16 (2^-9) on top where scales are of that dtype.
LARGEST_ERROR = {"nf4": 0.16, "int4": 1 / 8 + 0.01, "int8": 0.5 / 127 + 1e-6, "fp8": 2**-4 + 1e-6}


@every_format
@every_shape
def test_no_decoded_value_exceeds_the_largest_error(form, shape):
    weight = draw(shape)
    decoded = np.asarray(quantize(form, weight).dequantize(jnp.float32))
    assert decoded.shape == shape
    error = np.abs(decoded - weight).max() / np.abs(weight).max()
    assert 0 < error <= LARGEST_ERROR[form.name]


@every_format
@every_shape
def test_numpy_decodes_to_the_same_bits(form, shape):
    quantized = quantize(form, draw(shape))
    ours = form.decode(jax.tree.map(np.asarray, quantized.parts), shape)
    assert isinstance(ours, np.ndarray) and ours.dtype == np.float32
    # Operation by operation: compiled, XLA may fuse int4's product into its difference.
    with jax.disable_jit():
        expected = np.asarray(form.decode(quantized.parts, shape))
    assert np.array_equal(ours, expected)


@every_format
def test_dequantized_values_are_quantized_to_themselves(form):
    once = quantize(form, draw((64, 192))).dequantize(jnp.float32)
    twice = quantize(form, np.asarray(once)).dequantize(jnp.float32)
    # A scale is found again but for its rounding: to bfloat16, or to 8 bits under double NF4. Of a
    # group with a zero point, which need not use both ends of the codes, by up to half a step.
    bar = 1 / 15 if form == Int4(symmetric=False) else 0.02
    assert np.abs(np.asarray(twice - once)).max() <= bar * np.abs(np.asarray(once)).max()


@every_format
@pytest.mark.parametrize("shape", [(48, 128), (130, 65)])
def test_a_product_and_its_gradient_are_those_of_the_dequantized_weight(form, shape):
    quantized = quantize(form, draw(shape))
    x, g = draw((9, shape[1]), 1), draw((9, shape[0]), 2)
    plain = np.asarray(quantized.dequantize(jnp.float32), np.float64)

    @jax.jit
    def both(x, quantized, g):
        y, pullback = jax.vjp(lambda x: linear_float32(x, quantized), x)
        return y, pullback(g)[0]

    y, dx = both(x, quantized, g)
    for ours, exact in ((y, x @ plain.T), (dx, g @ plain)):
        assert np.abs(ours - exact).max() <= SAME * np.abs(exact).max()


@every_format
def test_experts_multiply_as_their_dequantized_weights_do(form):
    experts, shape, rows = 4, (48, 128), 64
    each = [quantize(form, draw(shape, seed)) for seed in range(experts)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    chosen = np.random.default_rng(0).integers(0, experts, rows)
    groups = group(jnp.asarray(chosen, jnp.int32), experts)
    x = draw((rows, shape[1]), 9)
    padded = jnp.concatenate([x, np.zeros((1, shape[1]), np.float32)])[groups.source]
    y = jax.jit(lambda x, w: grouped_linear(x, w, groups, shape[0]))(padded, stacked)
    expected = np.stack(
        [
            np.asarray(each[e].dequantize(jnp.float32), np.float64) @ x[i]
            for i, e in enumerate(chosen)
        ]
    )
    assert np.abs(np.asarray(y)[groups.slot] - expected).max() <= SAME * np.abs(expected).max()


@every_format
def test_only_codes_are_kept_for_the_backward_pass(form):
    """A scan over stacked layers under remat, as models have it, holds no dequantized stack."""
    size = 256
    one = quantize(form, draw((size, size)))
    x = jnp.zeros((8, size), jnp.bfloat16)

    def loss(x, stacked):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(linear_float32(x, w)).astype(x.dtype), None))
        return jnp.sum(lax.scan(body, x, stacked)[0].astype(jnp.float32))

    def temporaries(layers):
        stacked = jax.tree.map(lambda part: jnp.stack([part] * layers), one)
        compiled = jax.jit(jax.grad(loss)).lower(x, stacked).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    more = temporaries(36) - temporaries(12)
    # The inputs of 24 more layers are kept, 4 KiB each; a weight of bfloat16 would be 128 KiB.
    assert more < 24 * 16 * 2**10


def test_int8_is_that_of_bitsandbytes():
    weight = draw((40, 96))
    codes, absmax, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(torch.tensor(weight))
    ours = quantize(Int8(), weight)
    assert np.array_equal(np.asarray(ours.parts["codes"]), codes.numpy())
    assert np.array_equal(np.asarray(ours.parts["absmax"]), absmax.numpy())
    decoded = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes, absmax)
    assert np.array_equal(np.asarray(ours.dequantize(jnp.float32)), decoded.numpy())


def test_fp8_codes_are_those_of_the_reference_type():
    weight, form = draw((40, 96)), Float8(block=(16, 32))
    ours = quantize(form, weight)
    scale = np.asarray(ours.parts["scale"])
    spread = np.repeat(np.repeat(scale, 16, 0), 32, 1)[:40, :96]
    codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(np.asarray(ours.parts["codes"]), codes.view(np.uint8))
    expected = codes.astype(np.float32) * spread
    assert np.array_equal(np.asarray(ours.dequantize(jnp.float32)), expected)


def test_asymmetric_groups_are_closer_where_values_lie_to_one_side():
    weight = np.abs(draw((32, 128))) + 0.5
    errors = [
        np.abs(np.asarray(quantize(Int4(symmetric=s), weight).dequantize(jnp.float32)) - weight)
        for s in (True, False)
    ]
    assert errors[1].mean() < 0.6 * errors[0].mean()


def test_the_products_accumulate_in_float32():
    x = jnp.ones((1, 64), jnp.bfloat16)
    assert product(x, x, 1).dtype == outer(x, x).dtype == jnp.float32
