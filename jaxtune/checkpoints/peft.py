"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxtune.adapters.method import Stored
from jaxtune.checkpoints.atomic import new_directory
from jaxtune.checkpoints.huggingface import read_json
from jaxtune.checkpoints.safetensors import read_all, write_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_adapter(directory: str | Path) -> Stored:
    """Reads an adapter directory.

    Raises:
      JaxtuneError: a file is missing or broken.
    """
    directory = Path(directory)
    return Stored(read_json(directory / CONFIG), read_all(directory / WEIGHTS))


def write_adapter(directory: str | Path, stored: Stored) -> Path:
    """Writes a new adapter directory that PEFT loads, whole or not at all.

    Args:
      directory: to create.
      stored: what a method's `store` returned.
    """
    with new_directory(directory) as scratch:
        write_adapter_files(scratch, stored)
    return Path(directory)


def write_adapter_files(directory: Path, stored: Stored) -> None:
    """Writes the files of an adapter into an existing directory."""
    tensors = {name: np.asarray(value) for name, value in sorted(stored.tensors.items())}
    write_file(directory / WEIGHTS, tensors)
    text = json.dumps(stored.config, indent=2, ensure_ascii=False) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
