"""Places the tensors of a checkpoint on the devices that hold them, and reads no others.

A leaf of the model is one stack [layers, experts, …] of a checkpoint's tensors, sharded over the
devices. It is filled in place, tensor by tensor, so that neither host nor devices ever hold a
second copy of it:

1. `fetch` returns the part of a tensor that this process needs, usually a view of the memory map.
2. `Staging.put` copies it into one reused host buffer and transfers it, one shard per device. The
   result has a size of 1 per share on the leading axes.
3. `fill` writes it into the stack, whose buffer is donated, at the place of this layer and expert.

If the leading axes are themselves sharded (experts over `expert`, say), devices hold different
tensors. One round then transfers one tensor to each range of the axes at the same time.
"""

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
"""First index and last index + 1."""

Fetch = Callable[[tuple[int, ...], tuple[slice, ...]], np.ndarray]
"""Returns a box (a slice per axis) of the tensor that a round brings to a share of the stack."""

CopyTo = Callable[[tuple[int, ...], np.ndarray, np.ndarray], None]
"""Copies, into the second argument, values of the tensor that a round brings to a share."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The order in which a stack of tensors is filled.

    Sharding may split each leading axis (layers, experts) of a stack into equal ranges; a share is
    one range of each axis. A round brings one tensor to every share at the same time, so each
    device receives, and each process reads, only tensors of its own shares. With 2 layers, 8
    experts and the experts split into 4 shares, there are 2 · 2 = 4 rounds of 4 tensors each.

    Attributes:
      stack: sizes of the leading axes.
      shares: number of ranges into which each leading axis is split.
    """

    stack: tuple[int, ...]
    shares: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], lead: int, sharding: NamedSharding) -> Rounds:
        """Returns the rounds of an array of a `shape` whose first `lead` axes are a stack."""
        local = sharding.shard_shape(shape)[:lead]
        return cls(shape[:lead], tuple(n // m for n, m in zip(shape, local, strict=False)))

    def __len__(self) -> int:
        return math.prod(self.stack) // math.prod(self.shares)

    def places(self) -> Iterator[tuple[int, ...]]:
        """Yields, for each round, the index within every share that the round fills."""
        sizes = (n // k for n, k in zip(self.stack, self.shares, strict=True))
        return itertools.product(*map(range, sizes))

    def index(self, place: Sequence[int], share: Sequence[int]) -> int:
        """Returns the flat index in the stack of the tensor at a place of a share."""
        flat = 0
        for inner, outer, n, k in zip(place, share, self.stack, self.shares, strict=True):
            flat = flat * n + outer * (n // k) + inner
        return flat


def boxes_of_shares(
    shape: tuple[int, ...], lead: int, sharding: NamedSharding
) -> dict[tuple[int, ...], tuple[Range, ...]]:
    """Returns the box of the tensor that this process needs, for each share on its devices.

    The box is the smallest that contains the parts of all devices of this process.

    Args:
      shape: shape of a round's array: the first `lead` axes count shares, the others are those of
        a tensor.
      lead: number of leading axes.
      sharding: sharding of that array.
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
    """Returns the index ranges of an array that each device of this process holds."""
    return {
        device: tuple(part.indices(n)[:2] for part, n in zip(at or (), shape, strict=True))
        for device, at in sharding.addressable_devices_indices_map(shape).items()
    }


class Staging:
    """One host buffer through which every tensor passes on its way to the devices.

    Tensors in a file are seldom aligned or of the right dtype, so they must be copied. Allocating a
    new array for each would leave several of them in the allocator's free lists.
    """

    ALIGNMENT = 64  # bytes; JAX on a CPU then uses the buffer without a copy

    def __init__(self, size: int):
        """Allocates a buffer of `size` bytes, the largest result of `needed` over all arrays."""
        raw = np.empty(size + self.ALIGNMENT, np.uint8)
        self._buffer = raw[-raw.ctypes.data % self.ALIGNMENT :]

    @classmethod
    def needed(cls, shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype) -> int:
        """Returns the number of bytes of the buffer that `put` uses for an array."""
        shard_bytes = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        return len(set(_places(shape, sharding).values())) * cls._rounded(shard_bytes)

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
        copy_to: CopyTo,
    ) -> jax.Array:
        """Transfers a round's array, of which this process fetches only what its devices hold.

        Args:
          shape: global shape of the array: one size-1 entry per share, then a tensor's axes.
          dtype: dtype of the array, into which fetched values must fit.
          lead: number of axes that count shares.
          sharding: sharding over the devices of all processes; no device holds parts of two
            shares.
          fetch: returns a box of a share's tensor, possibly as a view of a file.
          copy_to: copies values of a share's tensor into an array of the buffer.

        Returns:
          An array that is valid until the next call, since it may alias the buffer.
        """
        places = _places(shape, sharding)
        staged: dict[tuple[Range, ...], np.ndarray] = {}
        used = 0
        for share, box in boxes_of_shares(shape, lead, sharding).items():
            value = fetch(share, tuple(slice(*bounds) for bounds in box))
            # Devices that replicate a part share its copy in the buffer.
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
                copy_to(share, target, part)
                staged[at] = target.reshape((1,) * lead + part.shape)
                used += self._rounded(size)
        shards = [jax.device_put(staged[at], device) for device, at in places.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def fill(
    stacked: jax.Array, value: jax.Array, place: jax.Array, sharding: NamedSharding
) -> jax.Array:
    """Writes a round's tensors into a stack, in place and without communication.

    Each device writes its part of its share's tensor at the same local index, because every round
    fills the same place of all shares.

    Args:
      stacked: [layers, experts, …], or with fewer leading axes; its buffer is donated.
      value: like `stacked`, with the number of shares as sizes of the leading axes; of any floating
        dtype, or that of the stack.
      place: int32 [leading axes], the index within each share.
      sharding: sharding of both arrays.
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
    # XLA's CPU backend converts bfloat16 to float32 around the update, which would rewrite the
    # whole stack for every layer. As uint16 the slice is updated in place.
    bits, part = (lax.bitcast_convert_type(array, jnp.uint16) for array in (stacked, value))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(bits, part, start), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def copy(value: jax.Array, dtype: Any) -> jax.Array:
    """Returns a copy, in `dtype`, of a staged array of any shape, which may alias the buffer."""
    return jnp.copy(value.astype(dtype))
