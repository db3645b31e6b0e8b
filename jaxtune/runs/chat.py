"""The chat settings of a run, stored in chat.json: chat template, end tokens and clock.

The template is stored as text, so that a changed file or another version of a built-in template
does not change the prompts of the run's model. The clock is the time at which the run started: a
template that prints the date gives the same tokens when the run is resumed, evaluated or prompted.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.chats import template_process
from jaxtune.chats.builtin import read_template, set_default_arguments
from jaxtune.chats.clock import now, read_clock
from jaxtune.chats.messages import read_arguments
from jaxtune.checkpoints.chat import Chat, adapter_chat, base_chat
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import AdapterConfig, Config, DataConfig
from jaxtune.data import Examples, ReaderOptions
from jaxtune.parallel.processes import agree_on_text, barrier, leads
from jaxtune.runs.directory import RunDirectory
from jaxtune.strict_json import expect, read_object

_logger = logging.getLogger(__name__)


def initial_chat(adapter: AdapterConfig, source: TensorSource) -> Chat:
    """Returns the chat settings of the model that training starts from.

    The template of an initial adapter (``adapter.init_from``) takes precedence over the base's.

    Args:
      adapter: the ``adapter`` section.
      source: checkpoint of ``model.path``.

    Raises:
      JaxtuneError: a file cannot be read.
    """
    base = base_chat(source.path, source.config)
    start = adapter.init_from
    return (adapter_chat(Path(start), base) if start else None) or base


def configured_chat(config: Config, source: TensorSource) -> Chat:
    """Returns `initial_chat` with the chat template of the config, if it sets one."""
    return _apply_template(initial_chat(config.adapter, source), config.data)


def reader_options(data: DataConfig, chat: Chat) -> ReaderOptions:
    """Returns the options of `DataReader` that follow from chat settings.

    Args:
      data: the ``data`` section.
      chat: chat settings of a run, or the result of `configured_chat`.
    """
    own = None if chat.tokenizer is None else chat.tokenizer.chat_template
    # A selected template is checked against the tokenizer; a checkpoint's own template is not.
    chosen = own if data.chat_template and isinstance(own, str) else ""
    return {"chat_template": chosen, "clock": chat.clock}


def create_run_chat(
    run: RunDirectory,
    config: Config,
    base: Chat,
    clock: datetime.datetime | None = None,
    *,
    anew: bool = False,
) -> Chat:
    """Returns the chat settings of a run; a new run writes them first.

    Those that replace the settings of an existing run are not written, because the resume may still
    be refused; see `RunDirectory.record`.

    Args:
      run: directory of the run.
      config: config of the run.
      base: chat settings of the model that the run starts from.
      clock: date and time of a new run; now by default.
      anew: whether the chat settings of an existing run are replaced.

    Raises:
      JaxtuneError: ``data.chat_template`` cannot be read.
    """
    if base.tokenizer is not None and base.tokenizer.chat_template:
        template_process.start()  # while the run is set up
    if anew:
        agreed = agree_on_text((clock or now()).isoformat())
        chat = _apply_template(base, config.data)
        return dataclasses.replace(chat, clock=read_clock(agreed, "the clock of process 0"))
    if leads() and not run.chat.is_file():
        chat = dataclasses.replace(_apply_template(base, config.data), clock=clock or now())
        run.write_chat(chat_content(chat, ()))
    barrier("chat.json is written")
    return _read(run, base)


def learned_end_tokens(chat: Chat, examples: Examples) -> list[int]:
    """Returns `find_end_tokens` of the training data.

    Warns if no learned span ends in an end token.
    """
    ends = find_end_tokens(examples.ends, chat)
    if examples.ends and not ends:
        _logger.warning(
            "no learned span ends in an end token (EOS or an added token of the tokenizer), so the "
            "model will not learn to stop; use a chat template that writes one"
        )
    return ends


def chat_content(chat: Chat, ends: Sequence[int]) -> dict[str, Any]:
    """Returns the content of the chat.json of a run.

    Args:
      chat: chat settings of the run, with a clock.
      ends: the end tokens of the training data.
    """
    assert chat.clock is not None
    return {
        "chat_template": None if chat.tokenizer is None else chat.tokenizer.chat_template,
        "eos_token_id": list(ends),
        "clock": chat.clock.isoformat(),
    }


def find_end_tokens(ends: Mapping[int, int], chat: Chat) -> list[int]:
    """Returns the sorted ids of the end tokens in which learned spans end.

    End tokens are EOS and the tokenizer's added tokens, such as ``<|im_end|>``.

    Args:
      ends: number of learned spans that end in a token, by token id.
      chat: chat settings with the tokenizer.
    """
    added = set() if chat.tokenizer is None else set(chat.tokenizer.added_tokens_decoder)
    return sorted(ends.keys() & {*added, *chat.eos_token_ids})


def load_run_chat(run: RunDirectory, config: Config, source: TensorSource) -> Chat:
    """Returns the chat settings of an existing run.

    Args:
      run: directory of the run.
      config: config of the run.
      source: checkpoint that the run started from.

    Raises:
      JaxtuneError: a file cannot be read.
    """
    base = initial_chat(config.adapter, source)
    if not run.chat.is_file():  # not started yet, or started by an earlier version
        return _apply_template(base, config.data)
    return _read(run, base)


def _apply_template(base: Chat, data: DataConfig) -> Chat:
    """Returns the chat with the section's template, whose arguments become defaults in it."""
    chat = base.with_template(read_template(data.chat_template))
    arguments = read_arguments(data.chat_template_kwargs, "data")
    template = None if chat.tokenizer is None else chat.tokenizer.chat_template
    if not template or not arguments:
        return chat
    if isinstance(template, str):
        return chat.with_template(set_default_arguments(template, arguments))
    named = {name: set_default_arguments(source, arguments) for name, source in template.items()}
    return chat.with_template(named)


def _read(run: RunDirectory, base: Chat) -> Chat:
    content = read_object(run.chat)
    template = content.get("chat_template")
    named = template if isinstance(template, dict) else {"": "" if template is None else template}
    for name, source in named.items():  # several templates by name, or one
        expect(source, str, f'{run.chat}: "chat_template"{name and f" {name}"}')
    ends = expect(content.get("eos_token_id", []), list, f'{run.chat}: "eos_token_id"')
    for token in ends:
        expect(token, int, f'{run.chat}: "eos_token_id"')
    clock = read_clock(content.get("clock", ""), f"{run.chat}: clock")
    return dataclasses.replace(base.with_template(template).ending_with(ends), clock=clock)
