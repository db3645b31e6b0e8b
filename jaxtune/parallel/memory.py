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
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtune.errors import JaxtuneError

GIB = 2**30
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_bytes() -> int:
    """Returns the memory that this process can have at most: of the machine, with swap space, of
    its container or of its limits (``ulimit -v``)."""
    memory, swap = _machine_bytes()
    limits = [memory + swap, *group_bytes(memory, swap)]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def _machine_bytes() -> tuple[int, int]:
    """Returns the bytes of the memory and of the swap space of the machine."""
    swap = 0
    if sys.platform == "darwin":  # which creates swap files as it needs them
        swap = shutil.disk_usage("/").free
    with contextlib.suppress(OSError):
        found = re.search(r"^SwapTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
        swap = 1024 * int(found[1]) if found else 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), swap


def group_bytes(memory: int, swap: int, root: Path = _GROUPS, own: Path = _OWN_GROUPS) -> list[int]:
    """Returns the limits of this process's control groups, with the swap space that they allow.

    A group is limited by its ancestors as well, such as a job of SLURM by its user's slice.

    Args:
      memory: memory of the machine in bytes.
      swap: swap space of the machine in bytes.
      root: directory where control groups of version 2, and ``memory`` of version 1, are mounted.
      own: file with the paths of this process's groups.
    """
    paths = {"": "/", "memory": "/"}  # by controller; version 2 has one path for all
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                paths["memory" if controllers else ""] = path
    found = []
    for directory in _with_ancestors(root, paths[""]):
        if (limit := _limit(directory / "memory.max")) is not None:
            own_swap = _limit(directory / "memory.swap.max")
            found.append(limit + (swap if own_swap is None else min(swap, own_swap)))
    for directory in _with_ancestors(root / "memory", paths["memory"]):
        if (limit := _limit(directory / "memory.limit_in_bytes")) is not None:
            total = _limit(directory / "memory.memsw.limit_in_bytes")  # with swap space
            found.append(limit + swap if total is None else min(limit + swap, total))
    return [limit for limit in found if limit < memory + swap]


def _with_ancestors(root: Path, path: str) -> list[Path]:
    """Returns the directories of a group and its ancestors, up to the root that is mounted."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _limit(path: Path) -> int | None:
    """Returns the bytes in a file of a control group; None if there is no file or no limit."""
    with contextlib.suppress(OSError, ValueError):  # "max"
        return int(path.read_text())
    return None


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
