"""Mesh sizes fitted to any number of devices."""

import math

import numpy as np
import pytest

from jaxtune.errors import JaxtuneError
from jaxtune.parallel.mesh import fit_mesh, mesh_shape
from jaxtune.parallel.rules import MESH_AXES

OTHERS = MESH_AXES[1:]
DEVICES = (*range(1, 65), 96, 128, 256, 512, 720, 1000, 4096)
EXPERTS = (0, 8, 60, 64, 160, 256)


def requests(count):
    """Random sizes of all axes, devices, routed experts and fixed axes."""
    draw = np.random.default_rng(0)
    for _ in range(count):
        # Small sizes and powers of two fit more often.
        sizes = {
            axis: int(draw.choice([1, int(draw.integers(1, 9)), 2 ** int(draw.integers(1, 7))]))
            for axis in MESH_AXES
        }
        sizes |= {"data": -1} if draw.random() < 0.5 else {}
        sizes |= {str(draw.choice(OTHERS)): -1} if draw.random() < 0.5 else {}
        fixed = {axis for axis in MESH_AXES if draw.random() < 0.4}
        yield sizes, int(draw.choice(DEVICES)), int(draw.choice(EXPERTS)), fixed


def fitting(devices, sizes, experts):
    """The largest divisor of the devices up to a size that divides the experts."""
    return max(n for n in range(1, devices + 1) if n <= sizes and devices % n == 0 == experts % n)


def test_all_devices_are_used_and_no_axis_of_a_config_grows():
    for sizes, devices, experts, _ in requests(1000):
        fitted, changes = fit_mesh(sizes, devices, experts=experts)
        assert math.prod(fitted.values()) == devices
        assert list(fitted) == list(MESH_AXES) and experts % fitted["expert"] == 0
        assert changes == {
            axis: (sizes[axis], fitted[axis])
            for axis in MESH_AXES
            if sizes[axis] not in (-1, fitted[axis])
        }
        # What fits already does not change, and is accepted where exact sizes are needed.
        assert fit_mesh(fitted, devices, experts=experts) == (fitted, {})
        assert fit_mesh(fitted, devices, fixed=MESH_AXES, experts=experts) == (fitted, {})
        assert mesh_shape(fitted, devices) == tuple(fitted.values())


def test_an_axis_shrinks_only_as_far_as_necessary():
    for sizes, devices, experts, _ in requests(1000):
        fitted, _ = fit_mesh(sizes, devices, experts=experts)
        left = devices
        for axis in sorted(OTHERS, key=lambda axis: sizes[axis] == -1):  # those of -1 come last
            size = left if sizes[axis] == -1 else sizes[axis]
            assert fitted[axis] == fitting(left, size, experts if axis == "expert" else 0)
            left //= fitted[axis]
        assert fitted["data"] == left


def test_fixed_axes_are_kept_or_the_nearest_sizes_are_named():
    refusals = 0
    for sizes, devices, experts, fixed in requests(1000):
        positive = {axis: sizes[axis] for axis in fixed if sizes[axis] > 0}
        try:
            fitted, changes = fit_mesh(sizes, devices, fixed=fixed, experts=experts)
            assert not changes.keys() & fixed
        except JaxtuneError as error:
            refusals += 1
            named = str(error).partition("the nearest sizes that can: ")[2].split(", ")
            nearest = {axis: int(n) for axis, n in (n[len("mesh.") :].split("=") for n in named)}
            assert nearest.keys() == positive.keys() and nearest != positive
            positive = nearest
            fitted, _ = fit_mesh(sizes | nearest, devices, fixed=fixed, experts=experts)
        assert {axis: fitted[axis] for axis in positive} == positive
        assert math.prod(fitted.values()) == devices
    assert 100 < refusals < 900


@pytest.mark.parametrize(
    "sizes, devices, fixed, experts, expected",
    [
        ({}, 32, (), 0, {"data": 32}),
        ({"data": 1, "fsdp": -1}, 256, (), 0, {"fsdp": 256}),
        ({"data": 1, "fsdp": 4, "expert": -1}, 1, (), 256, {}),
        ({"data": 1, "fsdp": 4, "expert": -1}, 64, (), 256, {"fsdp": 4, "expert": 16}),
        (
            {"data": 1, "fsdp": 4, "expert": -1},
            2048,
            (),
            256,
            {"data": 2, "fsdp": 4, "expert": 256},
        ),
        ({"fsdp": 4}, 6, (), 0, {"data": 2, "fsdp": 3}),
        ({"sequence": -1}, 12, (), 0, {"data": 3, "sequence": 4}),
        ({"fsdp": -1}, 8, (), 0, {"fsdp": 8}),
        ({"fsdp": -1, "tensor": 2}, 8, {"fsdp"}, 0, {"fsdp": 4, "tensor": 2}),
        # The axis on the command line takes the rest, not that of the config.
        ({"fsdp": -1, "expert": -1}, 8, {"fsdp"}, 64, {"fsdp": 8}),
        ({"data": -1, "fsdp": -1}, 8, {"data"}, 0, {"fsdp": 8}),
        ({"data": 2, "fsdp": -1}, 8, {"data"}, 0, {"data": 2, "fsdp": 4}),
    ],
)
def test_examples(sizes, devices, fixed, experts, expected):
    ones = dict.fromkeys(MESH_AXES, 1)
    requested = ones | {"data": -1} | sizes
    fitted = fit_mesh(requested, devices, fixed=fixed, experts=experts, length=1024)
    assert fitted.sizes == ones | expected


@pytest.mark.parametrize(
    "sizes, devices, fixed, experts, message",
    [
        ({"fsdp": 3}, 8, {"fsdp"}, 0, "mesh.fsdp=3 cannot be used with 8 device(s); the "
         "nearest sizes that can: mesh.fsdp=4"),
        ({"data": 1}, 8, {"data"}, 0, "mesh.data=1 cannot be used with 8 device(s); the "
         "nearest sizes that can: mesh.data=8"),
        ({"data": 4, "fsdp": 4}, 8, {"data", "fsdp"}, 0, "mesh.data=4, mesh.fsdp=4 cannot be used "
         "with 8 device(s); the nearest sizes that can: mesh.data=2, mesh.fsdp=4"),
        ({"expert": 16}, 16, {"expert"}, 60, "mesh.expert=16 cannot be used with 16 device(s), "
         "60 routed experts; the nearest sizes that can: mesh.expert=4"),
        ({"sequence": 8}, 8, {"sequence"}, 0, "mesh.sequence=8 cannot be used with 8 device(s), "
         "rows of 12 tokens; the nearest sizes that can: mesh.sequence=4"),
        ({"fsdp": -1, "tensor": -1}, 8, (), 0, "at most one besides mesh.data may be -1"),
        ({"fsdp": 0}, 8, (), 0, "mesh sizes must be positive"),
    ],
)  # fmt: skip
def test_refusals(sizes, devices, fixed, experts, message):
    requested = dict.fromkeys(MESH_AXES, 1) | {"data": -1} | sizes
    with pytest.raises(JaxtuneError) as refused:
        fit_mesh(requested, devices, fixed=fixed, experts=experts, length=12)
    assert message in str(refused.value)
