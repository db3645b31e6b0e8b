"""The chat format of a model: tokenizer, chat template, and the tokens that end an answer.

It is stored with the weights of a checkpoint or an adapter, in the files of `transformers`:
tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.checkpoints.formats.gguf_header import read_header
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError, shown
from jaxtune.strict_json import read_object, read_text

GENERATION_CONFIG = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Chat:
    """The chat format of a model.

    Attributes:
      tokenizer: tokenizer with the chat template in use; None if the model has none.
      generation_config: content of generation_config.json.
      eos_token_ids: tokens that end an answer, those of the base first.
      clock: time printed by the template; None for the time of each call.
    """

    tokenizer: Any
    generation_config: Mapping[str, Any]
    eos_token_ids: tuple[int, ...]
    clock: datetime.datetime | None = None

    def with_template(self, template: str | Mapping[str, str] | None) -> Chat:
        """Returns a copy with another chat template: Jinja source, or sources by name."""
        if self.tokenizer is None or not template or template == self.tokenizer.chat_template:
            return self
        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template if isinstance(template, str) else dict(template)
        return dataclasses.replace(self, tokenizer=tokenizer)

    def ending_with(self, ids: Sequence[int]) -> Chat:
        """Returns a copy with further end tokens, which are also added to generation_config."""
        together = tuple(dict.fromkeys([*self.eos_token_ids, *ids]))
        content = dict(self.generation_config)
        if not set(ids) <= set(_eos_ids(content, GENERATION_CONFIG)):
            content["eos_token_id"] = list(together) if len(together) > 1 else ids[0]
        return dataclasses.replace(self, generation_config=content, eos_token_ids=together)

    def files(self) -> dict[str, bytes]:
        """Returns the content of the tokenizer's and generation files, by path in the directory."""
        with tempfile.TemporaryDirectory(prefix="jaxtune-") as temporary:
            root = Path(temporary)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(root)
            written = {
                path.relative_to(root).as_posix(): path.read_bytes()
                for path in sorted(root.rglob("*"))
                if path.is_file()
            }
        return written | self.generation_files()

    def generation_files(self) -> dict[str, bytes]:
        """Returns the content of generation_config.json by file name; empty if there is none."""
        if not self.generation_config:
            return {}
        text = json.dumps(dict(self.generation_config), indent=2, ensure_ascii=False) + "\n"
        return {GENERATION_CONFIG: text.encode()}


def base_chat(location: Path, config: Mapping[str, Any]) -> Chat:
    """Returns the chat format of a checkpoint, with the end tokens that any of its files lists.

    Args:
      location: a Hugging Face directory or a ``.gguf`` file.
      config: content of its config.json, or the equivalent from the GGUF's metadata.

    Raises:
      JaxtuneError: a file cannot be read.
    """
    own = _read_generation_config(location)
    ids = [*_eos_ids(own, location / GENERATION_CONFIG), *_eos_ids(config, _config_of(location))]
    tokenizer = load_tokenizer(location)
    ids += _eos_of(tokenizer)
    # As in transformers, config.json replaces a missing generation_config.json.
    content = own or {key: config[key] for key in _SPECIAL if config.get(key) is not None}
    chat = Chat(tokenizer, content, tuple(dict.fromkeys(ids)))
    return chat if location.is_dir() else chat.ending_with(_gguf_ends(location))


def _config_of(location: Path) -> Path:
    return location / "config.json" if location.is_dir() else location


def _gguf_ends(path: Path) -> list[int]:
    """Returns the end-of-turn and end-of-message tokens in a GGUF's metadata; EOS is separate."""
    metadata = read_header(path).metadata
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))
    return [id_ for id_ in found if isinstance(id_, int)]


def adapter_chat(directory: Path, base: Chat) -> Chat | None:
    """Returns the chat format stored with an adapter, or None if its directory has none.

    The adapter's tokenizer replaces the base's if every token of the base has the same id in both;
    otherwise only its template is used.

    Args:
      directory: directory of the adapter, written by any program.
      base: chat format of the base model.

    Raises:
      JaxtuneError: a file cannot be read.
    """
    generation_config = _read_generation_config(directory)
    tokenizer = load_tokenizer(directory)
    template = _lone_template(directory) if tokenizer is None else None
    if not generation_config and tokenizer is None and template is None:
        return None
    if tokenizer is None:
        chat = base.with_template(template)
        if template and base.tokenizer is None:
            _logger.warning("%s: ignoring a chat template without a tokenizer", directory)
    else:
        chat = _joined(base, tokenizer, directory)
    if generation_config:
        chat = dataclasses.replace(chat, generation_config=generation_config)
    return chat.ending_with(
        [*_eos_ids(generation_config, directory / GENERATION_CONFIG), *chat.eos_token_ids]
    )


def _joined(base: Chat, tokenizer: Any, directory: Path) -> Chat:
    """Returns the base's chat format with the adapter's tokenizer, or only with its template."""
    end = _eos_of(tokenizer)
    if base.tokenizer is None:
        return dataclasses.replace(base, tokenizer=tokenizer).ending_with(end)
    known, added = base.tokenizer.get_vocab(), tokenizer.get_vocab()
    conflict = next((token for token, id_ in known.items() if added.get(token) != id_), None)
    if conflict is None:
        template = tokenizer.chat_template or base.tokenizer.chat_template
        chat = dataclasses.replace(base, tokenizer=tokenizer).with_template(template)
        return chat.ending_with(end)
    _logger.warning(
        "%s: its tokenizer has another id for %r than the base's, or none: using the base's "
        "tokenizer with the chat template of the adapter",
        directory,
        conflict,
    )
    id_ = known.get(str(tokenizer.eos_token))
    return base.with_template(tokenizer.chat_template).ending_with([] if id_ is None else [id_])


def _eos_of(tokenizer: Any) -> list[int]:
    return [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _lone_template(directory: Path) -> str | None:
    """Returns the chat template in the directory of an adapter without a tokenizer."""
    path, settings = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if path.is_file():
        return read_text(path)
    template = read_object(settings).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None


def combined_chat(chats: Mapping[str, Chat | None]) -> Chat | None:
    """Returns the chat format of a combination of adapters; logs a warning if theirs differ.

    Args:
      chats: chat format of each adapter, by name; None for an adapter without one.

    Returns:
      The first adapter's chat format with the end tokens of all; None if no adapter has one, or
      if they differ.
    """
    known = {name: chat for name, chat in chats.items() if chat is not None}
    if not known:
        return None
    (first, chat), *others = known.items()
    for name, other in others:
        if difference := _difference(chat, other):
            _logger.warning(
                "the adapters %s and %s have different %s: the combination gets neither; choose a "
                "chat template yourself",
                first,
                name,
                difference,
            )
            return None
        chat = chat.ending_with(other.eos_token_ids)
    if missing := [name for name, one in chats.items() if one is None]:
        _logger.warning(
            "using the chat template of %s; there is none with %s", first, ", ".join(missing)
        )
    return chat


def _difference(one: Chat, other: Chat) -> str:
    if (one.tokenizer is None) != (other.tokenizer is None):
        return "tokenizers"
    if one.tokenizer is None or one.tokenizer is other.tokenizer:
        return ""
    if one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        return "tokenizers"
    same = one.tokenizer.chat_template == other.tokenizer.chat_template
    return "" if same else "chat templates"


def _read_generation_config(location: Path) -> dict[str, Any]:
    path = location / GENERATION_CONFIG
    present = location.is_dir() and (path.exists() or path.is_symlink())
    content = read_object(path) if present else {}
    for key in _SPECIAL:
        _ids(content, key, path)
    return content


def _eos_ids(content: Mapping[str, Any], place: Path | str) -> list[int]:
    return _ids(content, "eos_token_id", place)


def _ids(content: Mapping[str, Any], key: str, place: Path | str) -> list[int]:
    """Returns the ids of a key, whose value may be one id, a list or null."""
    value = content.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id_ in ids:
        if isinstance(id_, bool) or not isinstance(id_, int) or not abs(id_) < 2**31:
            raise JaxtuneError(f"{place}: {key}={shown(id_)} is not a token id")
    return ids
