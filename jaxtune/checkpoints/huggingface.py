"""Hugging Face checkpoints: finding, opening, loading and saving them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.checkpoints.embeddings import TIED, with_stored_head
from jaxtune.checkpoints.formats.gguf import GGUFSource
from jaxtune.checkpoints.formats.registry import READERS
from jaxtune.checkpoints.saving import Beside, checkpoint_tensors, convert, save
from jaxtune.checkpoints.source import ALL, ReadFile, TensorSource
from jaxtune.checkpoints.streaming import load
from jaxtune.checkpoints.weights import FORMS, has_weights, open_weights
from jaxtune.config import QuantizeConfig
from jaxtune.errors import JaxtuneError, lookup, shown
from jaxtune.hub import closest_path, is_reachable, unreachable
from jaxtune.quant import Format, Quantization, quantization_from_config
from jaxtune.strict_json import read_object

__all__ = [
    "Beside",
    "HuggingFaceSource",
    "checkpoint_tensors",
    "choose_quantization",
    "convert",
    "load",
    "open_source",
    "read_config",
    "resolve_path",
    "save",
]

_logger = logging.getLogger(__name__)


class HuggingFaceSource:
    """A directory with config.json and weights, in one file or in several with an index.

    The weights are safetensors if there are any, otherwise PyTorch's own files.
    """

    def __init__(self, directory: Path):
        """Opens every file of a checkpoint and reads its header.

        Raises:
          JaxtuneError: a file is missing, damaged or named outside the directory, or two files
            disagree.
        """
        self.path = directory
        self.config = read_object(directory / "config.json")
        if {"training", "adapter", "model"} <= self.config.keys():
            raise JaxtuneError(
                f"{directory}: a run, not a checkpoint: use jaxtune generate --workdir {directory} "
                f'or jaxtune.Run("{directory}").model()'
            )
        self._by_name = open_weights(directory)

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._by_name[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype."""
        return self._by_name[name].dtype(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it, mapped where possible."""
        return self._by_name[name].read(name, rows)

    def read_parts(self, name: str, form: Format) -> None:
        """Returns None: the tensors are plain."""
        del name, form

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor."""
        return str(self._by_name[name].path)

    def files(self) -> Sequence[ReadFile]:
        """Returns the files from which tensors are read."""
        return list({file.path: file for file in self._by_name.values()}.values())


# Python files may be referenced by auto_map; exports copy them, and they are never run.
FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.py")
TORCH_FILES = ("pytorch_model*.bin",)
_WEIGHT_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")


def resolve_path(path: str, revision: str = "", files: Sequence[str] = FILES) -> Path:
    """Returns the local directory or .gguf file of a model; downloads a hub id if necessary.

    PyTorch's own weight files are downloaded only if there are no safetensors.

    Args:
      path: path of a directory or .gguf file, or a hub id.
      revision: branch, tag or commit of a hub id; empty for its default branch.
      files: patterns of the files to download.

    Raises:
      JaxtuneError: `path` is neither a local path nor a hub id that can be downloaded.
    """
    if not path:
        raise JaxtuneError("model.path is empty: give a Hugging Face directory, hub id or .gguf")
    local = Path(path).expanduser()
    if local.exists():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith(_WEIGHT_FILES):
        raise JaxtuneError(f"{path}: no such file or directory{closest_path(path)}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    named = f"{path} (revision {revision})" if revision else path

    def fetch(patterns: Sequence[str]) -> Path:
        options = {"revision": revision or None, "allow_patterns": list(patterns)}
        return Path(snapshot_download(path, local_files_only=not is_reachable(path), **options))

    try:
        found = fetch(files)
        if "*.safetensors" in files and not has_weights(found, 0):
            found = fetch((*files, *TORCH_FILES))
        return found
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise JaxtuneError(
            f"{named}: no such directory here, not in the hub's cache, and the hub is out of reach "
            f"({unreachable()}){closest_path(path)}"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JaxtuneError(
            f"{named}: not a local path, and the hub reports: {reason}{closest_path(path)}"
        ) from error


def open_source(path: Path) -> TensorSource:
    """Opens a Hugging Face directory, whose weights may be quantized, or a .gguf file.

    Raises:
      JaxtuneError: another kind of path, or an unknown quantization method.
    """
    if path.is_dir():
        source: TensorSource = HuggingFaceSource(path)
        settings = source.config.get("quantization_config")
        if settings is not None:
            if not isinstance(settings, Mapping):
                raise JaxtuneError(
                    f"{path}: quantization_config is {shown(settings)} in config.json, not an "
                    "object"
                )
            kind = str(settings.get("quant_method"))
            where = f"{path}: quantization_config.quant_method"
            source = lookup(READERS, kind, where).open(source)
        return with_stored_head(source)
    if path.suffix == ".gguf":
        return GGUFSource(path)
    raise JaxtuneError(f"{path}: neither a Hugging Face directory nor a .gguf file")


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the content of config.json of a directory with or without weights.

    If there are weights and the head is tied, the entry is corrected as in `with_stored_head`.
    """
    config = read_object(directory / "config.json")
    weights = any(has_weights(directory, form) for form in range(len(FORMS)))
    return open_source(directory).config if config.get(TIED) and weights else config


def choose_quantization(
    section: QuantizeConfig, model_config: Mapping[str, Any]
) -> Quantization | None:
    """Returns the quantization of the base that a config's ``quantize`` section selects, or None.

    If the checkpoint is stored in the selected format, its own settings replace those of the
    config, so that its weights are kept bit for bit.

    Args:
      section: ``quantize`` section of a resolved config.
      model_config: content of the checkpoint's config.json.
    """
    quantization = quantization_from_config(section)
    settings = model_config.get("quantization_config")
    if not isinstance(settings, Mapping) or settings.get("quant_method") not in READERS:
        return quantization
    stored = READERS[settings["quant_method"]].form(settings, Path())
    if quantization is None:
        _logger.info(
            "the checkpoint is quantized (%s) and will be dequantized: quantize.format=%s keeps "
            "its weights as they are",
            stored.name,
            stored.name,
        )
        return None
    if stored.name != quantization.format.name:
        return quantization
    return dataclasses.replace(quantization, format=stored)
