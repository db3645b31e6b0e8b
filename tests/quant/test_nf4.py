"""NF4 compared with bitsandbytes."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune.quant.codes import unpack
from jaxtune.quant.nf4 import BLOCK, DYNAMIC, NF4, NormalFloat4, quantize_scales
from jaxtune.quant.weight import QuantizedWeight

# Rows of whole blocks and not, few and many blocks, a tensor within one block, an odd count.
SHAPES = [(128, 256), (96, 576), (7, 100), (33, 65), (5, 3), (64, 64 * 260)]


def draw(shape, seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    weight.flat[:3] = 0
    return weight


def theirs(weight, double):
    """Returns (codes as bytes, QuantState) of bitsandbytes."""
    return bnb.quantize_4bit(torch.tensor(weight), compress_statistics=double, quant_type="nf4")


def as_bytes(parts, columns):
    """Returns our codes as bitsandbytes packs them: row by row, the first of a pair on top."""
    codes = np.asarray(unpack(jnp.asarray(parts["codes"]), columns)).T.reshape(-1)
    if codes.size % 2:
        codes = np.append(codes, 7)  # the code of zero, with which it is filled up
    return (codes[::2] << 4) | codes[1::2]


def row_order(parts):
    """Returns the scales in the order of the weight's rows."""
    return np.asarray(parts["absmax"]).T.reshape(-1)


def test_the_tables_equal_those_of_bitsandbytes():
    assert np.array_equal(NF4, bnb.get_4bit_type("nf4", device="cpu").numpy())
    assert np.array_equal(DYNAMIC, bnb.create_dynamic_map().numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_those_of_bitsandbytes(shape):
    weight = draw(shape)
    parts = jax.jit(NormalFloat4(double=False).encode)(weight)
    codes, state = theirs(weight, double=False)
    assert np.array_equal(as_bytes(parts, shape[1]), codes.numpy().reshape(-1))
    assert np.array_equal(row_order(parts), state.absmax.numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_scales_equal_those_of_bitsandbytes_given_its_offset(shape):
    absmax = row_order(jax.jit(NormalFloat4().encode)(draw(shape)))
    _, state = theirs(draw(shape), double=True)
    offset = np.float32(state.offset.item())
    codes, nested, _ = quantize_scales(absmax, offset)
    # On a CPU bitsandbytes looks float32 up in a table of 2^16 values, which is off by one code in
    # some hundreds; on a GPU it is exact, as its CPU code is for other dtypes.
    exact, _ = torch.ops.bitsandbytes.quantize_blockwise(
        torch.tensor(absmax - offset).double(), bnb.create_dynamic_map(), 256
    )
    assert np.array_equal(nested, state.state2.absmax.numpy())
    assert np.array_equal(codes, exact.numpy())
    steps = codes.astype(int) - state.absmax.numpy()
    assert np.abs(steps).max() <= 1 and np.mean(steps != 0) < 0.02


@pytest.mark.parametrize("shape", SHAPES)
def test_the_offset_is_that_of_bitsandbytes_within_two_units_in_the_last_place(shape):
    _, state = theirs(draw(shape), double=True)
    form = NormalFloat4()
    parts = form.finish(jax.tree.map(np.asarray, form.encode(jnp.asarray(draw(shape)))))
    ours, other = parts["nested_offset"], np.float32(state.offset.item())
    assert abs(int(ours.view(np.int32)) - int(other.view(np.int32))) <= 2


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_equals_that_of_bitsandbytes_bit_for_bit(shape, double, dtype):
    weight = torch.tensor(draw(shape)).to(getattr(torch, dtype))
    codes, state = bnb.quantize_4bit(weight, compress_statistics=double, quant_type="nf4")
    form = NormalFloat4(double)
    parts = form.finish(jax.tree.map(np.asarray, form.encode(jnp.asarray(weight.float().numpy()))))
    assert np.array_equal(as_bytes(parts, shape[1]), codes.numpy().reshape(-1))
    if double:  # theirs, for the offset and with it the codes of scales may differ by a little
        like = parts["absmax"].T
        parts["absmax"] = state.absmax.numpy().reshape(like.shape).T
        parts["nested_absmax"] = state.state2.absmax.numpy()
        parts["nested_offset"] = np.asarray(state.offset.item(), np.float32)
    quantized = QuantizedWeight(jax.tree.map(jnp.asarray, parts), form, shape, (None, None))
    ours = jax.jit(lambda weight: weight.dequantize(dtype))(quantized)
    expected = bnb.dequantize_4bit(codes, state).float().numpy()
    assert np.array_equal(np.asarray(ours, np.float32), expected)


def test_a_block_of_zeros_is_decoded_to_zeros():
    weight = draw((4, 128))
    weight[1] = 0
    form = NormalFloat4()
    parts = form.finish(jax.tree.map(np.asarray, form.encode(jnp.asarray(weight))))
    quantized = QuantizedWeight(jax.tree.map(jnp.asarray, parts), form, (4, 128), (None, None))
    decoded = np.asarray(quantized.dequantize(jnp.float32))
    assert not decoded[1].any() and np.isfinite(decoded).all() and decoded[0].any()


def test_a_stack_is_decoded_as_its_layers_are():
    weights = [draw((6, 2 * BLOCK), seed) for seed in range(3)]
    form = NormalFloat4()
    parts = [form.finish(jax.tree.map(np.asarray, form.encode(jnp.asarray(w)))) for w in weights]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    quantized = QuantizedWeight(stacked, form, (6, 2 * BLOCK), (None, None))
    assert quantized.shape == (3, 6, 2 * BLOCK)
    one = QuantizedWeight(
        jax.tree.map(lambda part: part[1], stacked), form, (6, 2 * BLOCK), (None, None)
    )
    assert np.array_equal(
        np.asarray(quantized.dequantize(jnp.float32))[1], np.asarray(one.dequantize(jnp.float32))
    )
