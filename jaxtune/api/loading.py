"""Loads a checkpoint into memory, or converts it to another checkpoint."""

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
from jaxtune.api.meshes import loading_mesh
from jaxtune.api.model import Choice, Model
from jaxtune.chats.ends import turn_end_tokens
from jaxtune.chats.template import read_template
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.chat import Chat, adapter_chat, combined_chat
from jaxtune.checkpoints.embeddings import untied, with_vocabulary
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.open_model import OpenModel, files_beside, open_model
from jaxtune.errors import JaxtuneError, check_argument, check_path, lookup
from jaxtune.quant import Quantization
from jaxtune.registry import DTYPES

# Name of an adapter that is passed to `load` without a name.
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
    """Loads a model, optionally with adapters.

    Args:
      path: a Hugging Face directory, hub id or .gguf file.
      adapter: directory of an adapter in PEFT's format, which is put in use.
      quantize: weight format ("nf4", "int4", "int8", "fp8"), or the settings of a config's
        ``quantize`` section; None for plain weights in `dtype`.
      dtype: "bfloat16", "float16" or "float32": dtype of plain weights and of the computation.
      adapters: directories of adapters in PEFT's format by name, for `Model.use`; the base model
        is in use at first.
      revision: branch, tag or commit of a hub id; empty for its default branch.
      mesh: mesh on which the weights are placed; by default one device if they fit on it, or else
        all devices along ``fsdp`` (see `jaxtune.api.meshes.loading_mesh`).
      attention: attention backend; "auto" chooses by platform.
      chat_template: a Jinja file or the name of a built-in template; by default that of the
        adapter in use, or else of the checkpoint.
      progress: shows a progress bar if loading takes more than two seconds.

    Raises:
      JaxtuneError: the checkpoint, an adapter or a setting is invalid.
    """
    if adapters is not None:
        check_argument("adapters", adapters, Mapping, "a dict of directories by name")
    if adapter is not None and adapters:
        raise JaxtuneError("adapter and adapters are both given: pass all of them in adapters")
    if mesh is not None:
        check_argument("mesh", mesh, Mesh, "a jax.sharding.Mesh")
    if chat_template != "":
        check_path("chat_template", chat_template)
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
    """Loads a model like `load`, with the base in use.

    Args:
      path: see `load`.
      quantize: see `load`.
      dtype: see `load`.
      adapters: see `load`.
      revision: see `load`.
      mesh: see `load`.
      attention: see `load`.
      chat_template: Jinja source; empty for the template of the adapters or the checkpoint.
      chats: returns the chat format for an adapter, a combination or none; by default that of the
        adapters or the checkpoint.
      progress: see `load`.

    Raises:
      JaxtuneError: the checkpoint, an adapter or a setting is invalid.
    """
    directories = {
        name: check_path(f"adapters[{name!r}]", each) for name, each in (adapters or {}).items()
    }
    stored = {name: read_adapter(directory) for name, directory in directories.items()}
    opened, quantization = _open(path, quantize, dtype, revision)
    source = opened.source
    if mesh is None:
        mesh = loading_mesh(define(source.config, dtype, quantization=quantization))
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
    """Returns a chat format with another template and the tokens with which it ends a turn."""
    if not template or chat.tokenizer is None:
        return chat
    chat = chat.with_template(template)
    return chat.ending_with(turn_end_tokens(chat.tokenizer))


class _Chats:
    """Chat formats of a checkpoint by the adapters in use."""

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
        chats = {name: self._of_adapter(name) for name in names}
        return combined_chat(chats) or self._base()

    def _of_adapter(self, name: str) -> Chat | None:
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
    """Converts a checkpoint to a Hugging Face directory, one tensor at a time.

    The model is never held in memory.

    Args:
      path: a Hugging Face directory, hub id or .gguf file.
      directory: directory to create.
      quantize: weight format or settings, as in `load`; None dequantizes.
      dtype: "bfloat16", "float16" or "float32": dtype of plain weights.
      revision: branch, tag or commit of a hub id; empty for its default branch.
      untie: writes a separate head if the head is tied to the embedding.
      vocab_size: new number of rows of embedding and head, for tokens that were added to the
        tokenizer or for a size that a mesh divides; new rows are the mean of the existing ones.
        None keeps the number.
      progress: shows a progress bar if writing takes more than two seconds.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the checkpoint or a setting is invalid, or the directory is not empty.
    """
    directory = check_path("directory", directory)
    if vocab_size is not None:
        check_argument("vocab_size", vocab_size, int, "a number of tokens")
    opened, quantization = _open(path, quantize, dtype, revision)
    source = untied(opened.source) if untie else opened.source
    source = source if vocab_size is None else with_vocabulary(source, vocab_size)
    return huggingface.convert(
        directory,
        define(source.config, dtype, quantization=quantization),
        source,
        beside=files_beside(opened.directory, opened.chat),
        progress=progress,
    )


def _open(
    path: str | Path, quantize: str | Mapping[str, Any] | None, dtype: str, revision: str
) -> tuple[OpenModel, Quantization | None]:
    """Returns a model's files and the quantization of its weights."""
    lookup(dict.fromkeys(DTYPES), dtype, "dtype")
    check_argument("revision", revision, str, "a branch, tag or commit")
    quantize = {} if quantize is None else quantize
    check_argument("quantize", quantize, (str, Mapping), "a weight format or a dict of settings")
    if not isinstance(path, str) or path:
        check_path("path", path)  # as it is: "./" tells a directory from a hub id
    section = {"format": quantize} if isinstance(quantize, str) else dict(quantize)
    settings = config_module.resolve({"quantize": section}).quantize
    opened = open_model(path, revision)
    return opened, huggingface.choose_quantization(settings, opened.source.config)
