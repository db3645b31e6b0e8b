"""The files of a base model, recorded by a run and compared later: names, sizes, block hashes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.adapters.define import define
from jaxtune.checkpoints.blocks import BLOCK, BlockHashes, first_difference, hash_file
from jaxtune.checkpoints.open_model import OpenModel
from jaxtune.checkpoints.weights import FORMS, has_weights

# What is read of the chat format. Other files of a directory may come and go: the hub's cache is
# shared with programs that download more of a repository.
_CHAT = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# What transformers reads in place of tokenizer.json.
_VOCABULARY = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken")
_GGUF = "model.gguf"
_SHOWN = 3  # differences that a message lists


class FileRecord(NamedTuple):
    """A file: its size in bytes and the hashes of its blocks."""

    size: int
    hashes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BaseRecord:
    """What a run stores about its base model.

    Attributes:
      path: ``model.path`` of the config.
      revision: ``model.revision`` of the config.
      commit: commit of a hub id; empty for a local path.
      shapes: hash of the names and shapes of the tensors.
      arrays: hash of the names and shapes of the arrays that the model makes of them.
      block: size of a block in bytes.
      files: the files by name, relative to the directory.
    """

    path: str
    revision: str
    commit: str
    shapes: str
    arrays: str
    block: int
    files: Mapping[str, FileRecord]

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form."""
        content = dataclasses.asdict(self)
        content["files"] = {
            name: {"size": file.size, "hashes": list(file.hashes)}
            for name, file in self.files.items()
        }
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> BaseRecord:
        """Reads the JSON form, whose checksum has been compared."""
        files = {
            name: FileRecord(file["size"], tuple(file["hashes"]))
            for name, file in content["files"].items()
        }
        return cls(**{**content, "files": files})

    def digest(self) -> str:
        """Returns a hash of the content of all files."""
        return _hash(self.to_dict()["files"])


class Inventory:
    """The files of an opened model, and the hashes of their blocks while they are read."""

    def __init__(self, model: OpenModel, block: int = BLOCK):
        """Lists the files and their sizes; nothing is read.

        Args:
          model: the opened model.
          block: size of a block in bytes.
        """
        self._model, self._block = model, block
        paths = _beside(model.directory)
        for file in model.source.files():
            paths[_name(file.path, model.directory)] = file.path
        self._paths = dict(sorted(paths.items()))
        self.sizes = {name: path.stat().st_size for name, path in self._paths.items()}

    @functools.cached_property
    def shapes(self) -> str:
        """Hash of the names and shapes of the tensors, whether or not they are used."""
        source = self._model.source
        return _hash({name: source.shape(name) for name in source.names()})

    @functools.cached_property
    def arrays(self) -> str:
        """Hash of the names and shapes of the model's arrays, before a method is attached."""
        leaves = define(self._model.source.config, np.float32).leaves
        return _hash(
            {
                "/".join(map(str, path)): leaf.declaration.stacked_shape
                for path, leaf in leaves.items()
            }
        )

    @contextlib.contextmanager
    def hashing(self) -> Iterator[BlockHashes]:
        """Hashes the blocks of every file that reading the tensors touches within the block."""
        directory = self._model.directory
        files = {_name(file.path, directory): file for file in self._model.source.files()}
        maps = {name: file.mapped for name, file in files.items() if file.mapped is not None}
        with BlockHashes(self._paths, self._block, maps) as hashes:
            for name, file in files.items():
                file.on_read = functools.partial(hashes.touched, name)
            try:
                yield hashes
            finally:
                for file in files.values():
                    file.on_read = None

    def record(self, path: str, revision: str, hashes: Mapping[str, Sequence[str]]) -> BaseRecord:
        """Returns the record of the model.

        Args:
          path: ``model.path`` of the config.
          revision: ``model.revision`` of the config.
          hashes: result of `BlockHashes.complete`.
        """
        files = {name: FileRecord(size, tuple(hashes[name])) for name, size in self.sizes.items()}
        commit, block = self._model.commit, self._block
        return BaseRecord(path, revision, commit, self.shapes, self.arrays, block, files)

    def differences(self, recorded: BaseRecord) -> list[str]:
        """Compares names of files, and names and shapes of tensors, with a record."""
        found = [f"{name} is missing" for name in recorded.files if name not in self.sizes]
        found += [f"{name} is new" for name in self.sizes if name not in recorded.files]
        if self.shapes != recorded.shapes:
            found.append("names or shapes of tensors differ")
        return found

    def changed_blocks(
        self, recorded: BaseRecord, hashes: Mapping[str, Sequence[str]]
    ) -> list[str]:
        """Compares the content of all files that have the same names and sizes in a record."""
        return [
            line
            for name, size in self.sizes.items()
            if name in recorded.files and recorded.files[name].size == size
            for line in _changed(recorded, name, hashes[name])
        ]


def file_differences(directory: Path, recorded: BaseRecord) -> list[str]:
    """Compares sizes, and the content of all files but weights, before anything is parsed.

    Args:
      directory: directory or ``.gguf`` file of the model.
      recorded: record of the model.
    """
    beside, found = _beside(directory), []
    for name, file in recorded.files.items():
        path = directory if name == _GGUF else directory / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != file.size:
            found.append(f"{name} has {size} bytes instead of {file.size}")
        elif name in beside:
            found += _changed(recorded, name, hash_file(path, recorded.block))
    return found + [f"{name} is new" for name in beside if name not in recorded.files]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _changed(recorded: BaseRecord, name: str, hashes: Sequence[str]) -> list[str]:
    size, old = recorded.files[name]
    where = first_difference(old, hashes, size, recorded.block)
    return [] if where is None else [f"{name} differs within bytes {where[0]}–{where[1]}"]


def listed(differences: Sequence[str]) -> str:
    """Returns differences for a message, of which only the first few are spelled out."""
    more = len(differences) - _SHOWN
    return ", ".join(differences[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def chat_files(directory: Path) -> list[Path]:
    """Returns the files of a directory from which the chat format is read; see `base_chat`."""
    whole = (directory / "tokenizer.json").is_file()
    found = {
        path
        for pattern in (_CHAT if whole else (*_CHAT, *_VOCABULARY))
        for path in directory.glob(pattern)
        if path.is_file() and not path.name.startswith(".")
    }
    return sorted(found)


def _beside(directory: Path) -> dict[str, Path]:
    """Returns the files that are read from a model's directory except weights, by relative path."""
    if not directory.is_dir():
        return {}
    forms = [form for number, form in enumerate(FORMS) if has_weights(directory, number)]
    names = ["config.json", *(form.index for form in forms[:1])]
    found = [path for name in names if (path := directory / name).is_file()]
    return {_name(path, directory): path for path in [*found, *chat_files(directory)]}


def _name(path: Path, directory: Path) -> str:
    """Returns the name of a file in a record; a ``.gguf`` file may be renamed."""
    return _GGUF if path == directory else path.relative_to(directory).as_posix()
