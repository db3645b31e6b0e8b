"""Compilation for NVIDIA GPUs on machines without one, for a described H100."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.experimental import topologies

HOW_TO_INSTALL = 'pip install "jaxtune[gpu-plan]"'

# Properties of a device for the compiler: https://github.com/openxla/xla, tools/hlo_opt/gpu_specs.
_DEVICE = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "memory_bandwidth": 3352320000000,
    "l2_cache_size": 52428800,
    "clock_rate_ghz": 1.98,
    "device_memory_size": 84942979072,
    "shared_memory_per_block_optin": 232448,
    "cuda_compute_capability": "{ major: 9 feature_extension: ACCELERATED_FEATURES }",
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "device_vendor": '"NVIDIA Corporation"',
    "platform_version": '"Compute Capability 9.0a"',
    "device_address_bits": 64,
    "pcie_bandwidth": 34359738368,
    "ecc_enabled": "true",
    "name": '"NVIDIA H100 80GB HBM3"',
    "driver_version": '"13.0.0"',
    "runtime_version": '"12.9.0"',
    "compile_time_toolkit_version": '"12.9.0"',
    "dnn_version": '"9.10.0"',
}


def available() -> bool:
    """Returns whether the compiler is installed."""
    return (
        importlib.util.find_spec("jax_plugins") is not None
        and importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
        and _toolkit() is not None
    )


def _toolkit() -> Path | None:
    """Returns the directory of ptxas and libdevice in the wheels, or None."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [Path(place) / "cuda_nvcc" for place in places]
    return next((path for path in found if (path / "bin" / "ptxas").is_file()), None)


def devices(count: int) -> Sequence[Any]:
    """Returns `count` H100s as targets of compilation; they hold no data."""
    toolkit = _toolkit()
    flags = "--xla_gpu_autotune_level=0"  # there is no GPU to time kernels on
    if toolkit is not None and "xla_gpu_cuda_data_dir" not in os.environ.get("XLA_FLAGS", ""):
        # The plugin reads both variables when it is loaded.
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} {flags} --xla_gpu_cuda_data_dir={toolkit}".strip()
        )
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{toolkit / 'bin'}"
    fields = " ".join(
        f"{name} {value}" if str(value).startswith("{") else f"{name}: {value}"
        for name, value in _DEVICE.items()
    )
    target = (
        f'gpu_device_info {{ {fields} }} platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 10 patch: 0 } "
        'device_description_str: "NVIDIA H100 80GB HBM3"'
    )
    described = topologies.get_topology_desc(
        "h100", "cuda", topology=f"1x1x{count}", target_config=target
    )
    return described.devices
