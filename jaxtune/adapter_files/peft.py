"""Adapter directories in the formats of PEFT, AdapterHub and ESFT.

PEFT's files are adapter_config.json and adapter_model.safetensors, or adapter_model.bin if there
are no safetensors.

The network that computed an adapter's tensors is stored in encoder.safetensors. PEFT keeps no such
file and ignores it; training resumes from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.adapter_files.agreement import check_agreement
from jaxtune.adapter_files.fused import split
from jaxtune.adapter_files.settings import check_settings
from jaxtune.adapters.esft import esft
from jaxtune.adapters.method import StoredAdapter, is_adapterhub
from jaxtune.atomic_files import new_directory, write_files
from jaxtune.checkpoints.formats.safetensors import write_file
from jaxtune.checkpoints.formats.torch_pickle import printable
from jaxtune.checkpoints.weights import open_file, read_finite, read_weights
from jaxtune.errors import JaxtuneError
from jaxtune.hub import closest_path
from jaxtune.strict_json import read_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTERHUB = "adapter.safetensors"
TORCH_WEIGHTS = {WEIGHTS: "adapter_model.bin", ADAPTERHUB: "pytorch_adapter.bin"}
ENCODER = "encoder.safetensors"
# ESFT's own config in place of adapter_config.json; its tensors may be in any files.
EXPERTS = "expert_cfg.json"
EXPERT_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def read_adapter(directory: str | Path, *, encoder: bool = False) -> StoredAdapter:
    """Reads an adapter directory; edits of fused experts are split into those of each expert.

    Args:
      directory: directory to read.
      encoder: also reads encoder.safetensors, if present, in order to continue training.

    Raises:
      JaxtuneError: a file is missing or damaged, or settings and tensors disagree.
    """
    directory = Path(directory)
    if not directory.exists():
        raise JaxtuneError(f"{directory / CONFIG}: no such file{closest_path(directory)}")
    if (directory / EXPERTS).is_file() and not (directory / CONFIG).is_file():
        return _read_experts(directory)
    if not (directory / CONFIG).is_file() and (directory / "adapter" / "last").is_dir():
        raise JaxtuneError(
            f"{directory}: a run, not an adapter: use {directory}/adapter/best or "
            f'jaxtune.Run("{directory}").model()'
        )
    config = read_object(directory / CONFIG)
    check_settings(config)
    weights = _weights_file(config)
    tensors = read_weights(directory, (weights, TORCH_WEIGHTS[weights]))
    check_agreement(config, tensors)
    has_encoder = encoder and (directory / ENCODER).is_file()
    network = read_weights(directory, (ENCODER,)) if has_encoder else None
    return split(StoredAdapter(config, tensors, network))


def files_read(directory: Path) -> tuple[Path, list[Path]]:
    """Returns the config of an adapter and the existing files of its weights."""
    config = directory / CONFIG
    if (directory / EXPERTS).is_file() and not config.is_file():
        return directory / EXPERTS, _expert_files(directory)
    names = (WEIGHTS, ADAPTERHUB, *TORCH_WEIGHTS.values(), ENCODER)
    return config, [directory / name for name in names if (directory / name).is_file()]


def _expert_files(directory: Path) -> list[Path]:
    found = (sorted(directory.glob(pattern)) for pattern in EXPERT_WEIGHTS)
    return next((paths for paths in found if paths), [])


def _read_experts(directory: Path) -> StoredAdapter:
    """Reads the files of ESFT's own programs: any number of them, preferably safetensors."""
    files = _expert_files(directory)
    if not files:
        raise JaxtuneError(f"{directory}: holds {EXPERTS} but no {' or '.join(EXPERT_WEIGHTS)}")
    tensors: dict[str, np.ndarray] = {}
    for path in files:
        file = open_file(path)
        for name in file.names():
            key = f"model.{name}" if name.startswith("layers.") else name
            if key in tensors:
                raise JaxtuneError(
                    f'{path}: tensor "{printable(name)}" is also in another file of the '
                    "directory: remove the one that is out of date"
                )
            tensors[key] = read_finite(file, name)
    return StoredAdapter(read_object(directory / EXPERTS) | {"peft_type": esft.PEFT_TYPE}, tensors)


def _weights_file(config: Mapping[str, Any]) -> str:
    return ADAPTERHUB if is_adapterhub(config) else WEIGHTS


def write_adapter(
    directory: str | Path, stored: StoredAdapter, files: Mapping[str, bytes] | None = None
) -> Path:
    """Writes a new adapter directory that PEFT loads; the directory appears only when complete.

    Args:
      directory: directory to create.
      stored: the adapter, as returned by a method's `store`.
      files: content of further files, such as the tokenizer's, by path in the directory.

    Raises:
      JaxtuneError: the directory exists and is not empty.
    """
    with new_directory(directory) as scratch:
        write_adapter_files(scratch, stored)
        write_files(scratch, files or {})
    return Path(directory)


def write_adapter_files(directory: Path, stored: StoredAdapter) -> None:
    """Writes the files of an adapter into an existing directory."""
    weights = _weights_file(stored.config)
    for name, tensors in ((weights, stored.tensors), (ENCODER, stored.encoder)):
        if tensors is not None:
            write_file(
                directory / name, {key: np.asarray(value) for key, value in sorted(tensors.items())}
            )
    text = json.dumps(stored.config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    if stored.config.get("peft_type") == esft.PEFT_TYPE:
        (directory / EXPERTS).write_text(text, encoding="utf-8")
