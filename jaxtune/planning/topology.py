"""Target topologies for ahead-of-time compilation; no device is required."""

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

from jaxtune.errors import JaxtuneError, closest, lookup
from jaxtune.planning import cuda
from jaxtune.planning.devices import GPUS, TPUS, Chip, gpu

_BLOCKWISE = "blockwise, because cuDNN needs a GPU to check its support; it takes less memory"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      name: name, as in `--topology`.
      devices: JAX devices; those of a described topology hold no data. None without a compiler for
        them: plans are then estimated.
      count: number of devices.
      capacity_bytes: memory of each device that a program may use.
      chip: specification of a device; None for a CPU.
      note: a remark for the reader of the plan; may be empty.
    """

    name: str
    devices: Sequence[Any] | None
    count: int
    capacity_bytes: int
    chip: Chip | None = None
    note: str = ""


def find_topology(name: str) -> Topology:
    """Returns the topology with a name.

    Args:
      name: "cpu" for this machine; a TPU generation and its chips, "v5e:1x1", "v5p:2x2x1"; or
        NVIDIA GPUs, "h100:8", "rtx4090".

    Raises:
      JaxtuneError: an unknown name, a shape that does not exist, or no compiler for a TPU.
    """
    if name == "cpu":
        devices = jax.devices("cpu")
        return Topology(name, devices, len(devices), available_memory() // len(devices))
    kind, colon, shape = name.partition(":")
    if kind in GPUS:
        return describe_cards(name)
    if colon and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        chip = lookup(TPUS, kind, "topology")
        devices = _tpu_devices(name, shape)
        return Topology(name, devices, len(devices), chip.capacity_bytes, chip)
    raise JaxtuneError(
        f'topology "{name}" is neither "cpu" nor a TPU generation and its chips, as in "v5e:1x1" '
        f'or "v5p:2x2x1" (generations: {", ".join(TPUS)}), nor GPUs, as in "h100:8"'
        f"{closest(kind, [*TPUS, *GPUS])}"
    )


def describe_cards(name: str) -> Topology:
    """Returns the topology of NVIDIA GPUs, "rtx4090" or "h100:8".

    They are compiled for the nearest chip with a compiler, if there is one.

    Raises:
      JaxtuneError: an unknown GPU.
    """
    kind, _, number = name.partition(":")
    chip = gpu(kind)
    if number and not (number.isdigit() and int(number) > 0):
        raise JaxtuneError(f'"{name}" is not a number of GPUs, as in "{kind}:8"')
    count = int(number or 1)
    stand_in = f"compiled for {{}} and compared with the memory of the {kind}"
    if cuda.available():
        note = "" if kind == "h100" else f"there is no compiler for it: {stand_in}; "
        note = f"{note.format('H100s')}attention is compiled {_BLOCKWISE}"
        return Topology(name, cuda.devices(count), count, chip.capacity_bytes, chip, note)
    missing = f"needs the GPU compiler for an exact plan: {cuda.HOW_TO_INSTALL}"
    if kind == "h100" or count > 1 or importlib.util.find_spec("libtpu") is None:
        return Topology(name, None, count, chip.capacity_bytes, chip, f"{kind} {missing}")
    devices = _tpu_devices("v5p:1x1x1", "1x1x1")
    note = f"{stand_in.format('a v5p, the nearest chip with a compiler,')}; {kind} {missing}"
    return Topology(name, devices, count, chip.capacity_bytes, chip, note)


def _tpu_devices(name: str, shape: str) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise JaxtuneError(
            f'topology "{name}" needs the TPU compiler: pip install "jaxtune[tpu-plan]"'
        )
    # libtpu queries the machine for its TPU and waits for an answer even without one. These
    # variables answer; the topology overrides them. No chip is used, so several processes may
    # compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # By default hosts have 2 × 2 chips; a single chip needs a host of its own.
    one_chip = set(shape.split("x")) == {"1"}
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if one_chip else {}
    try:
        return topologies.get_topology_desc(name, "tpu", **bounds).devices
    except jax.errors.JaxRuntimeError as error:
        raise JaxtuneError(f'topology "{name}": {str(error).splitlines()[0]}') from error


def available_memory() -> int:
    """Returns the bytes of memory that are available to a new process on this machine."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        limits += [int(match[1]) * 1024] if match else []
    container = Path("/sys/fs/cgroup/memory.max")
    if container.is_file() and (text := container.read_text().strip()).isdigit():
        limits.append(int(text))
    return min(limits)
