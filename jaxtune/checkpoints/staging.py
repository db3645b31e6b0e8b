"""Bringing the tensors of a checkpoint to the devices that hold them, and reading no others."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Range = tuple[int, int]
"""First index, and the one after the last."""

Fetch = Callable[[tuple[int, ...], tuple[slice, ...]], np.ndarray]
"""Returns, of the tensor for one share of a stack, what lies in a box."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The order in which a stack of tensors is filled.

    Devices may split the leading axes (layers, experts) of a stack into shares. A round brings one
    tensor to each share at the same time, so that each device gets, and each process reads, none
    but its own.

    Attributes:
      stack: sizes of the leading axes.
      shares: into how many equal ranges each of them is split.
    """

    stack: tuple[int, ...]
    shares: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], lead: int, sharding: NamedSharding) -> Rounds:
        """Describes an array of a `shape` whose first `lead` axes are a stack."""
        local = sharding.shard_shape(shape)[:lead]
        return cls(shape[:lead], tuple(n // m for n, m in zip(shape, local, strict=False)))

    def __len__(self) -> int:
        return math.prod(self.stack) // math.prod(self.shares)

    def places(self) -> Iterator[tuple[int, ...]]:
        """Yields the place in each share that a round fills."""
        each = (n // k for n, k in zip(self.stack, self.shares, strict=True))
        return itertools.product(*map(range, each))

    def index(self, place: Sequence[int], share: Sequence[int]) -> int:
        """Returns the number of the tensor at a place of a share, in the order of the stack."""
        number = 0
        for at, which, n, k in zip(place, share, self.stack, self.shares, strict=True):
            number = number * n + which * (n // k) + at
        return number


def boxes_of_shares(
    shape: tuple[int, ...], lead: int, sharding: NamedSharding
) -> dict[tuple[int, ...], tuple[Range, ...]]:
    """Returns, for each share that devices of this process hold, the box that has all they need.

    Args:
      shape: of what a round brings: the first `lead` axes count shares, the others are a tensor's.
      lead: how many axes.
      sharding: of that array.
    """
    found: dict[tuple[int, ...], tuple[Range, ...]] = {}
    for at in _places(shape, sharding).values():
        share, box = tuple(start for start, _ in at[:lead]), at[lead:]
        known = found.get(share, box)
        found[share] = tuple(
            (min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(known, box, strict=True)
        )
    return found


def _places(shape: tuple[int, ...], sharding: NamedSharding) -> dict[Any, tuple[Range, ...]]:
    """Returns the part of an array that each device of this process holds."""
    return {
        device: tuple(part.indices(n)[:2] for part, n in zip(at or (), shape, strict=True))
        for device, at in sharding.addressable_devices_indices_map(shape).items()
    }


class Staging:
    """One host buffer through which every tensor passes on its way to the devices.

    A file's tensors seldom lie where a device can take them, and a fresh copy of each would leave
    the allocator holding several of them after they are gone.
    """

    ALIGNMENT = 64  # of jax's arrays on a CPU, which then takes the buffer as it is

    def __init__(self, size: int):
        """Allocates a buffer; `needed` says what each array takes."""
        raw = np.empty(size + self.ALIGNMENT, np.uint8)
        self._buffer = raw[-raw.ctypes.data % self.ALIGNMENT :]

    @classmethod
    def needed(cls, shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype) -> int:
        """Returns the bytes of the buffer that `put` takes for an array."""
        each = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        return len(set(_places(shape, sharding).values())) * cls._rounded(each)

    @classmethod
    def _rounded(cls, size: int) -> int:
        return -(-size // cls.ALIGNMENT) * cls.ALIGNMENT

    def put(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        lead: int,
        sharding: NamedSharding,
        fetch: Fetch,
    ) -> jax.Array:
        """Places what this process's devices hold of an array, and asks for nothing else.

        Args:
          shape: of the whole array, one round of a stack.
          dtype: of the array; holds every value of what is fetched.
          lead: axes that count shares.
          sharding: over the devices of all processes; no device holds parts of two shares.
          fetch: may return a view of a file: only what devices hold is looked at.

        Returns:
          An array that is valid until the next call: it may be the buffer itself.
        """
        places = _places(shape, sharding)
        staged: dict[tuple[Range, ...], np.ndarray] = {}
        used = 0
        for share, box in boxes_of_shares(shape, lead, sharding).items():
            value = fetch(share, tuple(slice(*each) for each in box))
            for at in dict.fromkeys(places.values()):
                if tuple(start for start, _ in at[:lead]) != share:
                    continue
                inner = tuple(
                    slice(start - first, stop - first)
                    for (start, stop), (first, _) in zip(at[lead:], box, strict=True)
                )
                part = value[inner]
                size = part.size * dtype.itemsize
                target = self._buffer[used : used + size].view(dtype).reshape(part.shape)
                np.copyto(target, part)
                staged[at] = target.reshape((1,) * lead + part.shape)
                used += self._rounded(size)
        shards = [jax.device_put(staged[at], device) for device, at in places.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def fill(
    stacked: jax.Array, value: jax.Array, place: jax.Array, sharding: NamedSharding
) -> jax.Array:
    """Puts a round's tensors into a stack, in place; no device hears of another.

    Args:
      stacked: [layers, experts, …], as far as there are such axes; consumed.
      value: the same with the number of shares on the leading axes; any floating dtype, or
        that of the stack.
      place: int32, in each share.
      sharding: of both.
    """
    spec = sharding.spec
    place_in = jax.shard_map(
        _place, mesh=sharding.mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec
    )
    return place_in(stacked, value, place)


def _place(stacked: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
    start = (*place, *(jnp.int32(0),) * (value.ndim - place.shape[0]))
    value = value.astype(stacked.dtype)
    if stacked.dtype != jnp.bfloat16:
        return lax.dynamic_update_slice(stacked, value, start)
    # XLA's CPU backend would rewrite the whole stack for every layer: it updates no bfloat16 slice.
    bits, part = (lax.bitcast_convert_type(array, jnp.uint16) for array in (stacked, value))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(bits, part, start), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def copy(value: jax.Array, dtype: Any) -> jax.Array:
    """Returns a staged array of any shape as one of its own, in `dtype`."""
    return jnp.copy(value.astype(dtype))
