"""From a checkpoint to a model in memory, or to another checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtune import config as config_module
from jaxtune.adapters.define import define
from jaxtune.api.model import DTYPES, Model, extra_files
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.assemble import assemble
from jaxtune.checkpoints.embeddings import untied, with_vocabulary
from jaxtune.checkpoints.named import NamedAdapters
from jaxtune.checkpoints.peft import read_adapter
from jaxtune.checkpoints.source import TensorSource
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.quant import Quantization

# What `load` calls the one adapter that is given without a name.
ONLY = "default"


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    quantize: str | Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    *,
    adapters: Mapping[str, str | Path] | None = None,
    revision: str = "",
    mesh: Mesh | None = None,
    attention: str = "auto",
    progress: bool = True,
) -> Model:
    """Loads a model, and the adapters that are given.

    Args:
      path: a Hugging Face directory, a hub id or a .gguf file.
      adapter: a directory in PEFT's format; the model is loaded with it in use.
      quantize: format of the weights ("nf4", "int4", "int8", "fp8"), or settings as the
        ``quantize`` section of a config has them; None keeps `dtype`.
      dtype: "bfloat16", "float16" or "float32", whatever is on disk.
      adapters: directories in PEFT's format by name, for `Model.use`; the base is in use first.
      revision: of a hub id.
      mesh: where the weights go; one device by default.
      attention: attention backend; by platform by default.
      progress: shows a bar when loading takes long.

    Raises:
      JaxtuneError: the checkpoint, the adapter or a setting is not usable; the message says why.
    """
    if adapter is not None and adapters:
        raise JaxtuneError("adapter and adapters are both given: name them all in adapters")
    directories = dict(adapters or {}) if adapter is None else {ONLY: adapter}
    stored = {name: read_adapter(directory) for name, directory in directories.items()}
    mesh = single_device_mesh() if mesh is None else mesh
    location, source, quantization = _open(path, quantize, dtype, revision)
    bare = assemble(source, dtype, mesh, quantization=quantization, progress=progress)
    named = NamedAdapters(bare, source, dtype, stored, quantization)
    model = Model(bare, location, mesh, dtype=dtype, attention=attention, adapters=named)
    return model if adapter is None else model.use(ONLY)


def convert(
    path: str | Path,
    directory: str | Path,
    quantize: str | Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
    *,
    revision: str = "",
    untie: bool = False,
    vocab_size: int | None = None,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint anew as a Hugging Face directory, one tensor at a time.

    The model is never in memory, whatever its format.

    Args:
      path: a Hugging Face directory, a hub id or a .gguf file.
      directory: to create.
      quantize: format of the weights, or settings, as of `load`; None dequantizes.
      dtype: "bfloat16", "float16" or "float32", of the weights that are not quantized.
      revision: of a hub id.
      untie: writes a head of its own where it is tied to the embedding.
      vocab_size: rows of embedding and head, for tokens that have been added to the tokenizer or
        for a size that a mesh divides; new rows are the mean of those that are there. None keeps
        them.
      progress: shows a bar when it takes long.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the checkpoint or a setting is not usable, or the directory is taken.
    """
    location, source, quantization = _open(path, quantize, dtype, revision)
    source = untied(source) if untie else source
    source = source if vocab_size is None else with_vocabulary(source, vocab_size)
    return huggingface.convert(
        directory,
        define(source.config, dtype, quantization=quantization),
        source,
        tokenizer=load_tokenizer(location),
        extra_files=extra_files(location),
        code_from=location if location.is_dir() else None,
        progress=progress,
    )


def _open(
    path: str | Path, quantize: str | Mapping[str, Any] | None, dtype: str, revision: str
) -> tuple[Path, TensorSource, Quantization | None]:
    """Returns where a checkpoint is, its tensors, and how they are to be quantized."""
    lookup(dict.fromkeys(DTYPES), dtype, "dtype")
    section = {"format": quantize} if isinstance(quantize, str) else dict(quantize or {})
    settings = config_module.resolve({"quantize": section}).quantize
    location = huggingface.resolve_path(str(path), revision)
    source = huggingface.open_source(location)
    return location, source, huggingface.choose_quantization(settings, source.config)
