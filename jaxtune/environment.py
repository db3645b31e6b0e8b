"""Environment variables that keep components which a run does not use from writing to stderr.

They are set when jaxtune is imported, before jax and transformers read them. Variables that the
user has set keep their values.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

# Google's vendor number on the PCI bus, where JAX looks for TPUs too, and two devices of virtual
# machines that are not TPUs: a disk and a network card. An unknown device may be a new TPU.
_GOOGLE, _NO_TPUS = "0x1ae0", ("0x001f", "0x0042")
# Answers to the questions that libtpu otherwise asks the metadata server of Google Cloud. Without a
# TPU, each unanswered one is a warning on stderr.
WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def silence_unused(
    environment: MutableMapping[str, str] = os.environ, root: Path = Path("/")
) -> None:
    """Sets variables for a machine without a TPU, and for a Python without torch.

    Args:
      environment: environment variables of the process.
      root: root of the file system in which devices are looked for.
    """
    if not has_tpu(environment, root):
        for name, value in WITHOUT_TPU.items():
            environment.setdefault(name, value)
    # Only tokenizers of transformers are used; it advises on import to install torch for models.
    if importlib.util.find_spec("torch") is None:
        environment.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def has_tpu(environment: MutableMapping[str, str], root: Path) -> bool:
    """Returns whether this machine may have a TPU.

    It may if one of its device files or PCI devices exists, or if a variable says that one is there
    or how to reach it.
    """
    told = ("JAX_FORCE_TPU_INIT", "TPU_NAME", "TPU_WORKER_ID", "TPU_CHIPS_PER_HOST_BOUNDS")
    if any(name in environment for name in told):
        return True
    if "tpu" in environment.get("JAX_PLATFORMS", ""):
        return True
    if any(root.glob("dev/accel*")) or any(root.glob("dev/vfio/[0-9]*")):
        return True
    return any(
        _read(vendor) == _GOOGLE and _read(vendor.with_name("device")) not in _NO_TPUS
        for vendor in root.glob("sys/bus/pci/devices/*/vendor")
    )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # a device that has just been removed
        return ""
