"""Target topologies for ahead-of-time compilation; no device is required."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from jaxtune.environment import WITHOUT_TPU
from jaxtune.errors import JaxtuneError, closest, lookup
from jaxtune.parallel.devices import GPUS, TPUS, Chip, DeviceGroup, gpu
from jaxtune.planning import cuda

_LARGEST = 16384  # devices of a topology
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

    @property
    def group(self) -> DeviceGroup:
        """The devices as those of a run, with the memory of the hardware that is planned for."""
        memory = self.capacity_bytes if self.chip is None else self.chip.allocator_bytes
        if self.devices is None:
            return DeviceGroup(self.count, self.name, "gpu", memory)
        group = DeviceGroup.of(self.devices)
        return group if self.chip is None else dataclasses.replace(group, memory=memory)


def find_topology(name: str) -> Topology:
    """Returns the topology with a name.

    Args:
      name: "cpu" for this machine; a TPU generation and its chips, "v5e:1x1", "v5p:2x2x1"; or
        GPUs, "h100:8" or "8xh100", "rtx4090".

    Raises:
      JaxtuneError: an unknown name, a shape that does not exist, or no compiler for a TPU.
    """
    if name == "cpu":
        devices = jax.devices("cpu")
        return Topology(name, devices, len(devices), available_memory() // len(devices))
    typed = name
    if number := re.fullmatch(r"(\d+)x([a-z].*)", name):
        name = f"{number[2]}:{number[1]}"
    kind, colon, shape = name.partition(":")
    if kind in GPUS:
        return describe_cards(name)
    _check_grid(name)
    if colon and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        chip = lookup(TPUS, kind, "topology")
        if len(shape) > 20 or not 0 < math.prod(map(int, shape.split("x"))) <= _LARGEST:
            raise JaxtuneError(f'topology "{name}": a grid has 1 to {_LARGEST} chips')
        devices = _tpu_devices(name, shape, chip.compiled_as or kind)
        note = "" if chip.name != "v7x" else "each chip is two devices"
        return Topology(name, devices, len(devices), chip.capacity_bytes, chip, note)
    raise JaxtuneError(
        f'topology "{typed}" is neither "cpu" nor a TPU generation and its chips, as in "v5e:1x1" '
        f'or "v5p:2x2x1" (generations: {", ".join(TPUS)}), nor GPUs, as in "h100:8"'
        f"{closest(kind, [*TPUS, *GPUS])}"
    )


# Grids of Cloud TPU slices by number of chips, with two dimensions for v5e and v6e and with three
# for the others.
_GRIDS = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    **{1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"},
    **{128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
}


def _check_grid(name: str) -> None:
    """Raises if a TPU is given with a number of chips instead of a grid, as in "v5e:8" or "v5e"."""
    kind, _, number = name.partition(":")
    number = number or "1"
    if kind in TPUS and number.isdigit():
        grids = _GRIDS if kind in ("v5e", "v6e") else _CUBES
        nearest = min(grids, key=lambda count: abs(count - int(number)))
        raise JaxtuneError(
            f'topology "{name}": a TPU takes a grid of chips; did you mean '
            f'"{kind}:{grids[nearest]}" ({nearest} {"chip" if nearest == 1 else "chips"})?'
        )


def describe_cards(name: str) -> Topology:
    """Returns the topology of GPUs, "rtx4090" or "h100:8".

    They are compiled for the nearest chip with a compiler, if there is one.

    Raises:
      JaxtuneError: an unknown GPU.
    """
    kind, _, number = name.partition(":")
    chip = gpu(kind)
    if number and not (number.isdigit() and int(number) > 0):
        raise JaxtuneError(f'"{name}" is not a number of GPUs, as in "{kind}:8"')
    if len(number) > 5 or int(number or 1) > _LARGEST:
        raise JaxtuneError(f"{kind}:{number[:20]}: at most {_LARGEST} GPUs can be planned for")
    count = int(number or 1)
    if chip.maker == "AMD":
        note = f"{kind}: jaxtune plans AMD GPUs by formulas only and has not been tested on one"
        return Topology(name, None, count, chip.capacity_bytes, chip, note)
    stand_in = f"compiled for {{}} and compared with the memory of the {kind}"
    if cuda.available():
        note = "" if kind == "h100" else f"there is no compiler for it: {stand_in}; "
        note = f"{note.format('H100s')}attention is compiled {_BLOCKWISE}"
        return Topology(name, cuda.devices(count), count, chip.capacity_bytes, chip, note)
    missing = f"needs the GPU compiler for an exact plan: {cuda.HOW_TO_INSTALL}"
    if kind == "h100" or count > 1 or importlib.util.find_spec("libtpu") is None:
        return Topology(name, None, count, chip.capacity_bytes, chip, f"{kind} {missing}")
    devices = _tpu_devices("v5p:1x1x1", "1x1x1", "v5p")
    note = f"{stand_in.format('a v5p, the nearest chip with a compiler,')}; {kind} {missing}"
    return Topology(name, devices, count, chip.capacity_bytes, chip, note)


def _tpu_devices(name: str, shape: str, kind: str) -> Sequence[Any]:
    """Returns the devices of a grid; `kind` is the compiler's name of the generation."""
    if importlib.util.find_spec("libtpu") is None:
        raise JaxtuneError(
            f'topology "{name}" needs the TPU compiler: pip install "jaxtune[tpu-plan]"'
        )
    # libtpu queries the machine for its TPU and waits for an answer even without one. These
    # variables answer; the topology overrides them. No chip is used, so several processes may
    # compile at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    for variable, value in WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    # By default hosts have 2 × 2 chips; a single chip needs a host of its own.
    one_chip = set(shape.split("x")) == {"1"}
    settings: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if one_chip else {}
    if kind == "v4":
        settings["chip_config_name"] = "megacore"  # one device per chip, as on Cloud TPU
    try:
        return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **settings).devices
    except jax.errors.JaxRuntimeError as error:
        grids = _CUBES if shape.count("x") == 2 else _GRIDS
        chips = math.prod(map(int, shape.split("x")))
        nearest = grids[min(grids, key=lambda count: abs(count - chips))]
        raise JaxtuneError(
            f'topology "{name}": {str(error).splitlines()[0]}; did you mean '
            f'"{name.partition(":")[0]}:{nearest}"?'
        ) from error


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
