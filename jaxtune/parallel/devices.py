"""Accelerator specifications (memory, FLOP/s, bandwidth) with their sources, and JAX's devices."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from jaxtune.errors import lookup

GIB = 2**30
MIB = 2**20

# Share of a GPU's memory that JAX's allocator takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION).
_ALLOCATOR_SHARE = 0.75

# GPU memory used by a CUDA context, with libraries and compiled kernels.
_CUDA_CONTEXT = GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as in `--topology` and `--device`.
      capacity_bytes: memory that a program may use.
      flops: dense bfloat16 FLOP/s with float32 accumulation.
      memory_bandwidth: bytes per second of the device's memory.
      link_bandwidth: bytes per second sent to other devices, over all links, one way.
      source: source of the figures.
      compiled_as: name in the TPU compiler, if it differs.
      maker: manufacturer; there is no compiler for AMD's.
    """

    name: str
    capacity_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    source: str
    compiled_as: str = ""
    maker: str = "NVIDIA"

    @property
    def allocator_bytes(self) -> int:
        """The part of `capacity_bytes` that JAX's allocator takes by default."""
        share = 1 if self.maker == "Google" else _ALLOCATOR_SHARE
        return int(self.capacity_bytes * share)


_CLOUD = "https://cloud.google.com/tpu/docs/"
_AMPERE = "NVIDIA Ampere GA102 GPU architecture whitepaper, v2"

_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper, v1.1"

# Memory of a TPU is the limit in libtpu's error for a program that does not fit: slightly less than
# that of the chip (16, 95 and 32 GB), because the system reserves some. Link bandwidth is one way:
# half of the bidirectional figure in the sources. JAX sees each of the two TensorCores of a v7x
# (Ironwood) as a device, so its figures are half of those of a chip.
TPUS = {
    chip.name: chip
    for chip in (
        Chip(
            *("v4", int(30.75 * GIB), 275e12, 1200e9, 300e9),
            f"{_CLOUD}v4; links: Jouppi et al., 2023 (https://arxiv.org/abs/2304.01433)",
            maker="Google",
        ),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, _CLOUD + "v5e", maker="Google"),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, _CLOUD + "v5p", maker="Google"),
        Chip("v6e", int(31.25 * GIB), 918e12, 1638e9, 400e9, _CLOUD + "v6e", maker="Google"),
        Chip(
            *("v7x", int(94.75 * GIB), 1153.5e12, 3690e9, 300e9, _CLOUD + "tpu7x"),
            compiled_as="tpu7x",
            maker="Google",
        ),
    )
}

# Memory as reported by nvidia-smi (rocm-smi for AMD), less a CUDA context. Links are NVLink or
# Infinity Fabric if the GPU has it (the A6000's bridge joins only two cards), or PCI Express × 16
# at 32 GB/s (4.0) or 64 GB/s (5.0), one way.
GPUS = {
    name: Chip(name, mib * MIB - _CUDA_CONTEXT, flops, memory, link, source)
    for name, mib, flops, memory, link, source in (
        ("h100", 81559, 989e12, 3352e9, 450e9, "NVIDIA H100 SXM data sheet"),
        ("h200", 143771, 989e12, 4800e9, 450e9, "NVIDIA H200 SXM data sheet"),
        ("b200", 183359, 2250e12, 8000e9, 900e9, "NVIDIA HGX B200 data sheet"),
        ("a100-80g", 81920, 312e12, 2039e9, 300e9, "NVIDIA A100 SXM data sheet"),
        ("a100-40g", 40960, 312e12, 1555e9, 300e9, "NVIDIA A100 SXM data sheet"),
        ("l40s", 46068, 362e12, 864e9, 32e9, "NVIDIA L40S data sheet"),
        ("rtx5090", 32607, 209.5e12, 1792e9, 64e9, _BLACKWELL),
        ("rtx4090", 24564, 165.2e12, 1008e9, 32e9, "NVIDIA Ada GPU architecture whitepaper, v2"),
        ("rtx4080", 16376, 97.5e12, 717e9, 32e9, "NVIDIA Ada GPU architecture whitepaper, v2"),
        ("rtx3090", 24576, 71e12, 936e9, 32e9, _AMPERE),
        ("rtx3080", 10240, 59.5e12, 760e9, 32e9, _AMPERE),
        ("rtx3080-12g", 12288, 61e12, 912e9, 32e9, _AMPERE),
        ("a6000", 49140, 154.8e12, 768e9, 32e9, _AMPERE),
        ("a10", 23028, 125e12, 600e9, 32e9, "NVIDIA A10 data sheet"),
    )
}
GPUS["mi300x"] = Chip(
    *("mi300x", 196592 * MIB - _CUDA_CONTEXT, 1307.4e12, 5325e9, 448e9),
    source="AMD Instinct MI300X data sheet",
    maker="AMD",
)


def gpu(name: str) -> Chip:
    """Returns a GPU by name.

    Raises:
      JaxtuneError: an unknown GPU; the message names the closest one.
    """
    return lookup(GPUS, name, "device")


# Nominal memory where there is no figure: of a CPU, because its devices share what the machine has,
# and of an unknown GPU.
CPU_BYTES, UNKNOWN_GPU_BYTES = 16 * GIB, 8 * GIB

_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "v7x",
}


def chip_of_kind(kind: str) -> Chip | None:
    """Returns the accelerator that JAX calls `kind`, such as "TPU v5 lite"; None if unknown.

    Of cards that differ in their memory alone it is the one with the least, unless the name has the
    size ("NVIDIA A100-SXM4-40GB"). A part of a card (MIG) and a laptop's GPU have less memory than
    the card of that name, and are unknown.
    """
    if kind in _TPU_KINDS:
        return TPUS.get(_TPU_KINDS[kind])
    words = re.sub(r"[^a-z0-9]+", " ", kind.lower()).strip()
    words = re.sub(r"\b(rtx) (?=\d)", r"\1", words)
    if re.search(r"\b(mig|laptop)\b", words):
        return None
    found = []
    for chip in GPUS.values():
        name, _, size = chip.name.partition("-")
        if re.search(rf"\b{name}\b", words):
            named = bool(size) and re.search(rf"\b{size}b?\b", words) is not None
            found.append((not named, chip.capacity_bytes, chip))
    return min(found, key=lambda each: each[:2])[2] if found else None


@dataclasses.dataclass(frozen=True)
class DeviceGroup:
    """The devices that a run is set up for.

    Attributes:
      count: number of devices.
      kind: type of the devices, as JAX names it.
      platform: "cpu", "gpu" or "tpu".
      memory: bytes of a device that JAX's allocator takes by default: a property of the type,
        whatever is free.
      devices: JAX devices; None if they are only described, so that nothing can be compiled.
    """

    count: int
    kind: str
    platform: str
    memory: int
    devices: Sequence[Any] | None = None

    @classmethod
    def of(cls, devices: Sequence[Any]) -> DeviceGroup:
        """Returns the group of JAX devices, which all are of the same type."""
        first = devices[0]
        chip, memory = chip_of_kind(first.device_kind), CPU_BYTES
        if chip is not None:
            memory = chip.allocator_bytes
        elif first.platform != "cpu":
            # The limit of the allocator: a fixed share of the memory, also while some is in use.
            # Whole GiB, so that all processes derive the same.
            own = next((d for d in devices if d.process_index == jax.process_index()), first)
            limit = (own.memory_stats() or {}).get("bytes_limit", UNKNOWN_GPU_BYTES)
            memory = limit // GIB * GIB
        return cls(len(devices), first.device_kind, first.platform, memory, devices)
