"""From a checkpoint to a model in memory, or to another checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtune import config as config_module
from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapters.define import define
from jaxtune.api.adapter_set import AdapterSet
from jaxtune.api.model import Choice, Model
from jaxtune.chats.ends import turn_end_tokens
from jaxtune.chats.template import read_template
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.chat import Chat, adapter_chat, combined_chat
from jaxtune.checkpoints.embeddings import untied, with_vocabulary
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.open_model import OpenModel, open_model
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.quant import Quantization
from jaxtune.registry import DTYPES

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
    chat_template: str | Path = "",
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
      chat_template: a Jinja file or the name of a built-in template, used whatever the checkpoint
        and the adapter bring; by default that of the adapter in use, or of the checkpoint.
      progress: shows a bar when loading takes long.

    Raises:
      JaxtuneError: the checkpoint, the adapter or a setting is not usable; the message says why.
    """
    if adapter is not None and adapters:
        raise JaxtuneError("adapter and adapters are both given: name them all in adapters")
    template = read_template(chat_template, "chat_template")
    directories = dict(adapters or {}) if adapter is None else {ONLY: adapter}
    model = load_with_adapters(
        path,
        quantize,
        dtype,
        adapters=directories,
        revision=revision,
        mesh=mesh,
        attention=attention,
        chat_template=template,
        progress=progress,
    )
    return model if adapter is None else model.use(ONLY)


def load_with_adapters(
    path: str | Path,
    quantize: str | Mapping[str, Any] | None,
    dtype: str,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    revision: str = "",
    mesh: Mesh | None = None,
    attention: str = "auto",
    chat_template: str = "",
    chats: Callable[[Choice], Chat] | None = None,
    progress: bool = True,
) -> Model:
    """Loads a model as `load` does, with the base in use.

    Args:
      path: as of `load`, and so are the others.
      quantize: format of the weights.
      dtype: of the weights.
      adapters: directories by name.
      revision: of a hub id.
      mesh: where the weights go.
      attention: attention backend.
      chat_template: Jinja source; empty: what the adapters or the checkpoint bring.
      chats: how the model is talked to with an adapter, several or none; by default as they say.
      progress: shows a bar when loading takes long.

    Raises:
      JaxtuneError: the checkpoint, an adapter or a setting is not usable.
    """
    directories = dict(adapters or {})
    stored = {name: read_adapter(directory) for name, directory in directories.items()}
    mesh = single_device_mesh() if mesh is None else mesh
    opened, quantization = _open(path, quantize, dtype, revision)
    source = opened.source
    bare = load_model(source, dtype, mesh, quantization=quantization, progress=progress)
    return Model(
        bare,
        opened.directory,
        mesh,
        dtype=dtype,
        attention=attention,
        adapters=AdapterSet(bare, source, dtype, stored, quantization),
        chats=chats or _Chats(opened, directories, chat_template),
    )


def choose_template(chat: Chat, template: str | Mapping[str, str] | None) -> Chat:
    """Returns a chat with another template, and with the token that it ends an answer with."""
    if not template or chat.tokenizer is None:
        return chat
    chat = chat.with_template(template)
    return chat.ending_with(turn_end_tokens(chat.tokenizer))


class _Chats:
    """How a checkpoint is talked to with each of its adapters."""

    def __init__(
        self,
        model: OpenModel,
        directories: Mapping[str, str | Path],
        template: str,
    ):
        self._base = functools.cache(lambda: choose_template(model.chat, template))
        self._directories, self._template = directories, template

    def __call__(self, choice: Choice) -> Chat:
        if choice is None:
            return self._base()
        names = [choice] if isinstance(choice, str) else list(choice)
        brought = {name: self._brought(name) for name in names}
        return combined_chat(brought) or self._base()

    def _brought(self, name: str) -> Chat | None:
        chat = adapter_chat(Path(self._directories[name]), self._base())
        if chat is None or chat.tokenizer is None:
            return chat
        return choose_template(chat, self._template or chat.tokenizer.chat_template)


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
    opened, quantization = _open(path, quantize, dtype, revision)
    source = untied(opened.source) if untie else opened.source
    source = source if vocab_size is None else with_vocabulary(source, vocab_size)
    return huggingface.convert(
        directory,
        define(source.config, dtype, quantization=quantization),
        source,
        code_from=opened.directory if opened.directory.is_dir() else None,
        tokenizer=opened.chat.tokenizer,
        extra_files=opened.chat.generation_files(),
        progress=progress,
    )


def _open(
    path: str | Path, quantize: str | Mapping[str, Any] | None, dtype: str, revision: str
) -> tuple[OpenModel, Quantization | None]:
    """Returns a model's files, and how its weights are to be quantized."""
    lookup(dict.fromkeys(DTYPES), dtype, "dtype")
    section = {"format": quantize} if isinstance(quantize, str) else dict(quantize or {})
    settings = config_module.resolve({"quantize": section}).quantize
    opened = open_model(path, revision)
    return opened, huggingface.choose_quantization(settings, opened.source.config)
