"""The memory of the machine and its devices, and requests that certainly exceed it.

An allocation that fails is an exception at best: XLA aborts the process in some places (exit code
134, which launchers try again), and the kernel kills a process that takes more than there is.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.errors import JaxtuneError

GIB = 2**30


def host_bytes() -> int:
    """Returns the memory that this process can have at most: of the machine, with swap space, of
    its container or of its limits (``ulimit -v``)."""
    limits = [_machine_bytes(), *_container_bytes()]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def _machine_bytes() -> int:
    swap = 0
    with contextlib.suppress(OSError):
        found = re.search(r"^SwapTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        swap = 1024 * int(found[1]) if found else 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + swap


def _container_bytes() -> list[int]:
    """Returns the limits of this process's control groups, versions 1 and 2, without swap space."""
    found = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is none; "max"
            found.append(int((Path("/sys/fs/cgroup") / name).read_text()))
    return found


def device_bytes(device: Any) -> int | None:
    """Returns the memory that the allocator of a device can take, in bytes, if it is known."""
    if device.platform == "cpu":
        return host_bytes()
    return (device.memory_stats() or {}).get("bytes_limit")


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of ShapeDtypeStructs with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def check_fits(what: str, mesh: Mesh, per_device: int, host: int = 0) -> None:
    """Raises if arrays certainly do not fit, before anything is allocated.

    Args:
      what: the arrays and the option that determines their size, for the error.
      mesh: mesh on which they are placed.
      per_device: bytes of the arrays on each device of the mesh.
      host: bytes of the arrays in the memory of the host.

    Raises:
      JaxtuneError: the arrays are larger than the memory of a device, or of the host.
    """
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if mine and mine[0].platform == "cpu":  # devices of a CPU share the memory of the host
        host, per_device = host + len(mine) * per_device, 0
    available = device_bytes(mine[0]) if mine and per_device else None
    if available is not None and per_device > available:
        raise JaxtuneError(
            f"{what}: {_gib(per_device)} per device, and a device has {_gib(available)}"
        )
    if host > (available := host_bytes()):
        raise JaxtuneError(f"{what}: {_gib(host)}, and this machine has {_gib(available)}")


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB"
