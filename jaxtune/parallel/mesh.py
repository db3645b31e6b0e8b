"""The device mesh of a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jaxtune.compatibility import check_versions
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.rules import MESH_AXES, even_spec


class FittedMesh(NamedTuple):
    """Sizes of the mesh axes for a number of devices.

    Attributes:
      sizes: devices along each of `MESH_AXES`, all positive.
      changes: axes that have another size than requested, as ``{axis: (requested, fitted)}``; axes
        with -1 are not among them.
    """

    sizes: dict[str, int]
    changes: dict[str, tuple[int, int]]


def fit_mesh(
    sizes: Mapping[str, int],
    devices: int,
    *,
    fixed: Collection[str] = (),
    experts: int = 0,
    length: int = 0,
) -> FittedMesh:
    """Fits the sizes of mesh axes to a number of devices; the result uses all of them.

    Axes in `fixed` keep their size. The other axes but ``data`` shrink to the largest divisor of
    the devices that are left, in the order of `MESH_AXES`. Then an axis of -1 takes all that are
    left, and ``data`` the rest.

    Args:
      sizes: devices along each of `MESH_AXES`. Besides ``data``, one axis may be -1, for all
        remaining devices. An axis of -1 in `fixed` has priority over one that is not.
      devices: number of devices.
      fixed: axes whose size must not change.
      experts: number of routed experts of a layer, a multiple of the size of ``expert``; 0: that
        size may be any.
      length: number of tokens of a row, a multiple of the size of ``sequence``; 0: that size may
        be any.

    Raises:
      JaxtuneError: the sizes are invalid, or those in `fixed` do not allow all devices to be used;
        the message has the nearest sizes that do.
    """
    kept = {axis: sizes[axis] for axis in MESH_AXES if axis in fixed}
    free = {axis: sizes[axis] for axis in MESH_AXES if axis not in fixed}
    for group in (kept, free):
        rest = [axis for axis, size in group.items() if size == -1 and axis != "data"]
        if len(rest) > 1 or any(size == 0 or size < -1 for size in group.values()):
            raise JaxtuneError(
                "mesh sizes must be positive, and at most one besides mesh.data may be -1: "
                + _show(sizes)
            )
    multiples = {"expert": experts, "sequence": length}
    fitted = _fit(kept, free, devices, multiples)
    if fitted is None:
        positive = {axis: size for axis, size in kept.items() if size > 0}
        nearest = min(
            (
                split
                for split in _factorizations(devices, list(positive))
                if _fit(kept | split, free, devices, multiples)
            ),
            key=lambda split: sum(abs(math.log(split[a] / size)) for a, size in positive.items()),
        )
        given = [f"{devices} device(s)"]
        given += [f"{experts} routed experts"] * bool(experts and "expert" in positive)
        given += [f"rows of {length} tokens"] * bool(length and "sequence" in positive)
        raise JaxtuneError(
            f"{_show(positive)} cannot be used with {', '.join(given)}; the nearest sizes that "
            f"can: {_show(nearest)}"
        )
    changed = {axis for axis, size in free.items() if size not in (-1, fitted[axis])}
    return FittedMesh(
        fitted, {axis: (free[axis], fitted[axis]) for axis in fitted if axis in changed}
    )


def _fit(
    kept: dict[str, int], free: dict[str, int], devices: int, multiples: Mapping[str, int]
) -> dict[str, int] | None:
    """Returns the sizes of all axes; None if `kept` does not allow all devices to be used.

    `multiples` has numbers that the size of an axis must divide; 0 is a multiple of any.
    """
    fitted, left = {}, devices
    for axis, size in kept.items():
        if size > 0:
            if left % size or multiples.get(axis, 0) % size:
                return None
            fitted[axis], left = size, left // size
    others = [(axis, size) for axis, size in (free | kept).items() if axis not in fitted]
    positive = [pair for pair in others if pair[1] > 0]
    rest = sorted((pair for pair in others if pair[1] == -1), key=lambda pair: pair[0] in free)
    for axis, size in [*positive, *rest]:
        if axis != "data":
            most = left if size == -1 else min(size, left)
            common = math.gcd(left, multiples.get(axis, 0))
            fitted[axis] = max(n for n in range(1, most + 1) if common % n == 0)
            left //= fitted[axis]
    if "data" not in fitted:
        fitted["data"], left = left, 1
    return {axis: fitted[axis] for axis in MESH_AXES} if left == 1 else None


def _factorizations(number: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yields all sizes of `axes` whose product divides `number`."""
    if not axes:
        yield {}
        return
    for size in (n for n in range(1, number + 1) if number % n == 0):
        for others in _factorizations(number // size, axes[1:]):
            yield {axes[0]: size} | others


def mesh_shape(sizes: Mapping[str, int], devices: int) -> tuple[int, ...]:
    """Returns the size of every mesh axis, in the order of `MESH_AXES`.

    Args:
      sizes: devices along each axis; at most one may be -1, for all remaining devices.
      devices: number of devices.

    Raises:
      JaxtuneError: the sizes do not multiply to `devices`; the message suggests sizes that do.
    """
    shape = [sizes[axis] for axis in MESH_AXES]
    if 0 in shape or shape.count(-1) > 1:
        raise JaxtuneError(
            "mesh sizes must be positive, and at most one may be -1: " + _show(sizes)
        )
    fixed = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % fixed == 0:
        shape[shape.index(-1)] = devices // fixed
    if math.prod(shape) != devices:
        raise JaxtuneError(
            f"{_show(sizes)} does not use all {devices} device(s); "
            f"mesh.data=-1 with the others at 1 always does"
        )
    return tuple(shape)


def _show(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"mesh.{axis}={sizes[axis]}" for axis in MESH_AXES if axis in sizes)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | int | None = None) -> Mesh:
    """Builds the mesh of a run; sharding is left to the compiler (automatic axis types).

    Args:
      sizes: devices along each of `MESH_AXES`; one of them may be -1.
      devices: all devices of the run by default; a number for an abstract mesh, which has shapes
        and shardings but no devices.

    Raises:
      JaxtuneError: the sizes do not use all devices, or do not fit their links.
    """
    check_versions()
    devices = jax.devices() if devices is None else devices
    types = (AxisType.Auto,) * len(MESH_AXES)
    if isinstance(devices, int):
        abstract: Any = AbstractMesh(mesh_shape(sizes, devices), MESH_AXES, axis_types=types)
        return abstract
    shape = mesh_shape(sizes, len(devices))
    try:
        return jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise JaxtuneError(
            f"{_show(dict(zip(MESH_AXES, shape, strict=True)))}: the links between these "
            f"{len(devices)} chips do not divide into axes of these sizes; use products of the "
            "sizes of their grid, such as 4 and 16 of 4x4x4"
        ) from error


def single_device_mesh() -> Mesh:
    """Returns a mesh of one device, the default of loading and generation."""
    return make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1])


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding on `mesh` of an array with these logical axes; see `even_spec`."""
    return NamedSharding(mesh, even_spec(axes, shape, mesh.shape))
