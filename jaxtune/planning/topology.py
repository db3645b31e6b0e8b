"""Hardware that is described and need not be there."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxtune.errors import JaxtuneError, lookup

GIB = 2**30

# Memory of a chip that a program may use: what libtpu's compiler names as available when a
# program does not fit. The chips hold a little more (16, 95 and 32 GB on
# https://cloud.google.com/tpu/docs/v5e, /v5p and /v6e), part of which the system keeps.
TPU_BYTES = {
    "v5e": int(15.75 * GIB),
    "v5p": int(95.74 * GIB),
    "v6e": int(31.25 * GIB),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: as asked for.
      devices: of jax; on a described topology they can be compiled for and hold no data.
      capacity_bytes: memory of each device that a program may use.
    """

    name: str
    devices: Sequence[Any]
    capacity_bytes: int


def describe(name: str) -> Topology:
    """Describes hardware by name.

    Args:
      name: "cpu" for this machine, or a TPU generation and its chips: "v5e:1x1", "v5p:2x2x1".

    Raises:
      JaxtuneError: an unknown name, a shape that does not exist, or no compiler for it.
    """
    if name == "cpu":
        devices = jax.devices("cpu")
        return Topology(name, devices, available_memory() // len(devices))
    generation, colon, shape = name.partition(":")
    if not colon or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise JaxtuneError(
            f'topology "{name}" is neither "cpu" nor a TPU generation and its chips, as in '
            f'"v5e:1x1" or "v5p:2x2x1" (generations: {", ".join(TPU_BYTES)})'
        )
    capacity = lookup(TPU_BYTES, generation, "topology")
    return Topology(name, _tpu_devices(name, shape), capacity)


def _tpu_devices(name: str, shape: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise JaxtuneError(
            f'topology "{name}" needs the TPU compiler: pip install "jaxtune[tpu-plan]"'
        )
    # libtpu asks the machine which TPU it has, and waits for an answer where there is none. What
    # it is told here is overruled by the topology. No chip is used, so several may compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # Hosts hold 2 × 2 chips unless told otherwise; only a single chip has a host to itself.
    one_chip = set(shape.split("x")) == {"1"}
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if one_chip else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **bounds).devices
    except jax.errors.JaxRuntimeError as error:
        raise JaxtuneError(f'topology "{name}": {str(error).splitlines()[0]}') from error


def available_memory() -> int:
    """Returns the bytes of memory that a new program can have on this machine."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        limits += [int(match[1]) * 1024] if match else []
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)
