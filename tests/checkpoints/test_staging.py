"""Tensors, and rows of them, that are read when a stack is filled."""

import itertools

import numpy as np
import pytest

from jaxtune.checkpoints.quantize import encode_rows
from jaxtune.checkpoints.staging import Rounds
from jaxtune.quant.fp8 import Float8
from jaxtune.quant.int4 import Int4
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import NormalFloat4


def test_each_tensor_of_a_stack_is_placed_once_in_its_own_share():
    layers, experts, shares = 3, 8, 4
    rounds = Rounds((layers, experts), (1, shares))
    found = {
        rounds.index(place, (0, share)): (place, share)
        for place, share in itertools.product(rounds.places(), range(shares))
    }
    assert len(rounds) == layers * experts // shares
    assert found == {
        layer * experts + expert: ((layer, expert % 2), expert // 2)
        for layer in range(layers)
        for expert in range(experts)
    }


def test_an_unstacked_array_takes_one_round():
    rounds = Rounds((), ())
    assert list(rounds.places()) == [()] and len(rounds) == 1 and rounds.index((), ()) == 0


@pytest.mark.parametrize("form", [Int4(32), Int4(0), Int4(64, False), Int8(), NormalFloat4(False)])
def test_rows_encoded_separately_have_the_same_codes(form):
    weight = np.random.default_rng(0).normal(size=(300, 192)).astype(np.float32)
    whole = encode_rows(weight.__getitem__, weight.shape, form, "weight", "file")
    rows = encode_rows(weight.__getitem__, weight.shape, form, "weight", "file", slice(75, 225))
    assert form.by_rows(weight.shape)
    for key, part in form.parts(weight.shape).items():
        of_these = (slice(None),) * part.axes.index(0) + (slice(75, 225),)
        np.testing.assert_array_equal(rows[key], whole[key][of_these])


@pytest.mark.parametrize(
    ("form", "shape"),
    [(NormalFloat4(True), (64, 64)), (NormalFloat4(False), (64, 50)), (Float8(), (256, 256))],
)
def test_rows_that_share_scales_are_encoded_together(form, shape):
    assert not form.by_rows(shape)
