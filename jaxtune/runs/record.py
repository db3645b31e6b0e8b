"""The record of a run, fingerprint.json: its config, and hashes of its inputs and its base model.

A resume is compared with the record. The record has a checksum of its own content, so that a
damaged record is told from a changed input. Values are hashed, not the text of JSON files, so a
file that has only been formatted differently is unchanged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import Config, from_content
from jaxtune.errors import JaxtuneError
from jaxtune.runs.inventory import BaseRecord
from jaxtune.strict_json import expect, parse_json, read_json, read_object

LEGACY = frozenset({"model", "tokenizer", "data.train", "data.eval"})
"""Keys of the records of earlier versions."""


class DamagedRecord(JaxtuneError):
    """The record cannot be read, or its checksum differs."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run has been trained with.

    Attributes:
      inputs: hashes by name: ``model`` (configuration and shapes of the base), ``tokenizer``,
        ``data.train``, ``data.eval``; and, if the run has them, ``chat``, ``expert_scores``,
        ``adapter.init_from`` (weights and chat format) and ``adapter.init_from.config``.
      config: config of the run; None in the record of an earlier version.
      base: the files of the base model; None in the record of an earlier version.
      replaced: the config that ``config.json`` may still have, because it is replaced after the
        record.
    """

    inputs: Mapping[str, str]
    config: Config | None
    base: BaseRecord | None
    replaced: Config | None = None

    def to_json(self) -> str:
        """Returns the content of the file.

        Raises:
          ValueError: a record of an earlier version.
        """
        if self.config is None or self.base is None:
            raise ValueError("a record of an earlier version")
        config = content_of(self.config)
        content: dict[str, Any] = {
            **self.inputs,
            "config": config,
            "config_sha256": hash_value(config),
            "base": self.base.to_dict(),
        }
        if self.replaced is not None:
            content["replaced"] = content_of(self.replaced)
        content["checksum"] = hash_value(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def content_of(config: Config) -> dict[str, Any]:
    """Returns the content of a ``config.json``, as JSON values."""
    return parse_json(config.to_json().encode(), "config.json", "file")


def hash_value(value: Any) -> str:
    """Returns the SHA-256 of a JSON value, whatever its layout in a file."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def hash_json(path: Path) -> str:
    """Returns `hash_value` of a file.

    Raises:
      JaxtuneError: the file is not JSON.
    """
    return hash_value(read_json(path))


def read_record(path: Path) -> Record | None:
    """Reads a record; None if there is no file.

    Raises:
      DamagedRecord: it cannot be read, or its checksum differs.
    """
    if not path.is_file():
        return None
    try:
        content = read_object(path)
    except JaxtuneError as error:
        raise DamagedRecord(f"{error} (the record of the run is damaged)") from error
    if "checksum" not in content and content.keys() == LEGACY:
        return Record({name: str(value) for name, value in content.items()}, None, None)
    checksum = content.pop("checksum", None)
    if checksum != hash_value(content):
        raise DamagedRecord(f"{path}: damaged: its checksum differs")
    try:
        frozen = expect(content.pop("config"), dict, str(path))
        if content.pop("config_sha256") != hash_value(frozen):
            raise DamagedRecord(f"{path}: damaged: config_sha256 is not the hash of its config")
        config = from_content(frozen, path)
        base = BaseRecord.from_dict(expect(content.pop("base"), dict, str(path)))
        replaced = content.pop("replaced", None)
        if replaced is not None:
            replaced = from_content(expect(replaced, dict, str(path)), path)
        inputs = {name: expect(value, str, f"{path}: {name}") for name, value in content.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedRecord(f"{path}: damaged: not the record of a run") from error
    return Record(inputs, config, base, replaced)
