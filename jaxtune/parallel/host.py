"""Computing on the host, and reading parts of arrays into its memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def host_device() -> Any:
    """Returns a CPU device, or an accelerator if the CPU backend of JAX is disabled."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def read_part(value: Any, place: Sequence[Any] = ()) -> np.ndarray:
    """Reads one entry of the leading axes of an array, wherever its shards are.

    Devices and hosts hold the parts of this entry and never the whole array. If the array is
    sharded over several processes, every process must call the function, and each receives the
    entry.

    Args:
      value: array of any shape and dtype: of jax, of NumPy, or a stored one.
      place: index on each of the leading axes.

    Returns:
      The array ``value[place]``, as a view if it is in host memory.
    """
    place = tuple(int(index) for index in place)
    if not isinstance(value, jax.Array):
        return np.asarray(value[place])
    if value.is_fully_replicated:
        whole = value.addressable_data(0)
        in_host_memory = next(iter(whole.devices())).platform == "cpu"
        return np.asarray(whole)[place] if in_host_memory else np.asarray(whole[place])
    found = np.zeros(value.shape[len(place) :], value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id != 0:  # another device holds the same values
            continue
        lead, inner = shard.index[: len(place)], shard.index[len(place) :]
        ranges = [at.indices(size)[:2] for at, size in zip(lead, value.shape, strict=False)]
        if all(first <= i < last for i, (first, last) in zip(place, ranges, strict=True)):
            local = tuple(i - first for i, (first, _) in zip(place, ranges, strict=True))
            found[inner] = np.asarray(shard.data[local] if local else shard.data)
    return found if value.is_fully_addressable else _joined(found)


def _joined(part: np.ndarray) -> np.ndarray:
    """Adds up arrays of all processes, of any shape, of which one at most is not zero at a place.

    The bytes are added, which is exact for every dtype.
    """
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[index] for index in sorted(firsts)]), ("process",))
    whole = (len(firsts), part.nbytes)
    mine = jax.device_put(
        np.ascontiguousarray(part).reshape(-1).view(np.uint8)[None], firsts[jax.process_index()]
    )
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    every = jax.make_array_from_single_device_arrays(whole, sharding, [mine])
    joined = _sum(every, NamedSharding(mesh, PartitionSpec()))
    return np.asarray(joined.addressable_data(0)).view(part.dtype).reshape(part.shape)


@functools.partial(jax.jit, static_argnames="sharding")
def _sum(parts: jax.Array, sharding: NamedSharding) -> jax.Array:
    total = jnp.sum(parts, axis=0, dtype=parts.dtype)
    return jax.lax.with_sharding_constraint(total, sharding)
