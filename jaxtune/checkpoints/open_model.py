"""Opening a model by its path: the files, and the chat format that comes with them."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

from jaxtune.checkpoints.chat import Chat, base_chat
from jaxtune.checkpoints.huggingface import Beside, open_source, resolve_path
from jaxtune.checkpoints.source import TensorSource

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """The files of a model; nothing but headers and config.json has been read.

    Attributes:
      directory: local Hugging Face directory, or ``.gguf`` file.
      source: tensors and config.
    """

    directory: Path
    source: TensorSource

    @property
    def commit(self) -> str:
        """Commit of a model from the hub, after which its cache names the directory; or empty."""
        cached = self.directory.parent.name == "snapshots"
        return self.directory.name if cached and _COMMIT.fullmatch(self.directory.name) else ""

    @functools.cached_property
    def chat(self) -> Chat:
        """Tokenizer, chat template and end tokens, read on first use (seconds for a tokenizer).

        Raises:
          JaxtuneError: a file that cannot be read.
        """
        return base_chat(self.directory, self.source.config)


def open_model(path: str | Path, revision: str = "") -> OpenModel:
    """Opens a model, downloading it first if `path` is a hub id.

    Args:
      path: Hugging Face directory, ``.gguf`` file or hub id: ``model.path`` of a config.
      revision: branch, tag or commit of a hub id; empty for its default branch.

    Raises:
      JaxtuneError: the model cannot be found, or its files are damaged or unsupported.
    """
    directory = resolve_path(str(path), revision)
    return OpenModel(directory, open_source(directory))


def files_beside(source: Path, chat: Chat) -> Beside:
    """Returns the files to write with the weights of a model from `source`, a directory or file."""
    code = source if source.is_dir() else None
    return Beside(chat.tokenizer, chat.generation_files(), code)
