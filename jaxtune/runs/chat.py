"""What a run knows of conversations, kept in chat.json: its template, its end tokens, its clock.

The template is kept as text, so that neither a changed file nor another version of a built-in one
changes what the run's model is asked. The clock is that of the start: a template that prints the
date gives the same tokens whenever the run is resumed, evaluated or asked.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.chats.builtin import read_template, with_arguments
from jaxtune.chats.clock import now, read_clock
from jaxtune.chats.messages import read_arguments
from jaxtune.checkpoints.chat import Chat, adapter_chat, base_chat
from jaxtune.checkpoints.huggingface import read_json
from jaxtune.checkpoints.source import TensorSource
from jaxtune.data import Examples
from jaxtune.parallel.processes import barrier, leads
from jaxtune.runs.directory import RunDirectory

_logger = logging.getLogger(__name__)


def start_chat(config: Any, source: TensorSource) -> Chat:
    """Returns how the model that training starts from is talked to.

    An adapter that it starts from (``adapter.init_from``) brings its template along, as anywhere.

    Args:
      config: resolved.
      source: the checkpoint of ``model.path``.

    Raises:
      JaxtuneError: a file that cannot be read.
    """
    base = base_chat(source.path, source.config)
    start = config.adapter.init_from
    return (adapter_chat(Path(start), base) if start else None) or base


def configured_chat(config: Any, source: TensorSource) -> Chat:
    """Returns what a run of a config begins with: `start_chat` with the template it chooses."""
    return _templated(start_chat(config, source), config)


def reading(config: Any, chat: Chat) -> dict[str, Any]:
    """Returns how data is read with a chat: options of `DataReader`.

    Args:
      config: resolved.
      chat: of a run, or what `configured_chat` returns.
    """
    own = None if chat.tokenizer is None else chat.tokenizer.chat_template
    # A template that was chosen is compared with the tokenizer; what a checkpoint brings is not.
    chosen = own if config.data.chat_template and isinstance(own, str) else ""
    return {"chat_template": chosen, "clock": chat.clock}


def begin_chat(
    run: RunDirectory, config: Any, base: Chat, clock: datetime.datetime | None = None
) -> Chat:
    """Returns the chat of a run, which a new run keeps from now on.

    Args:
      run: the run.
      config: its config.
      base: the chat of what it starts from.
      clock: the time of a new run, by default now.

    Raises:
      JaxtuneError: ``data.chat_template`` cannot be read.
    """
    if leads() and not run.chat.is_file():
        _write(run, _templated(base, config), (), clock or now())
    barrier("the chat template is kept")
    return _kept(run, base)


def keep_end_tokens(run: RunDirectory, chat: Chat, examples: Examples) -> Chat:
    """Returns the chat with the tokens that end what is learned, which the run keeps as well.

    Warns where nothing that is learned ends in a token that can end an answer.
    """
    ends = end_tokens(examples.ends, chat)
    if examples.ends and not ends:
        _logger.warning(
            "no learned span ends in an end token (EOS, or another token that the tokenizer adds), "
            "so answers will not end by themselves: use a chat template that writes one"
        )
    if leads():
        _write(run, chat, ends, chat.clock)
    barrier("the end tokens are kept")
    return chat.ending_with(ends)


def end_tokens(ends: Mapping[int, int], chat: Chat) -> list[int]:
    """Returns which of the last tokens of learned spans are there to end something, in order.

    Args:
      ends: how many spans end in a token, by its id.
      chat: its tokenizer knows the added tokens, such as ``<|im_end|>``. Others are text.
    """
    added = set() if chat.tokenizer is None else set(chat.tokenizer.added_tokens_decoder)
    return sorted(ends.keys() & {*added, *chat.eos_token_ids})


def run_chat(run: RunDirectory, config: Any, source: TensorSource) -> Chat:
    """Returns how the model of a run is talked to, after the fact.

    Args:
      run: a run that has begun.
      config: its config.
      source: the checkpoint that it started from.

    Raises:
      JaxtuneError: a file that cannot be read.
    """
    base = start_chat(config, source)
    if not run.chat.is_file():  # of an earlier version
        return _templated(base, config)
    return _kept(run, base)


def _templated(base: Chat, config: Any) -> Chat:
    """Returns the chat with the template of a config and its arguments, which travel with it."""
    chat = base.with_template(read_template(config.data.chat_template))
    arguments = read_arguments(config.data.chat_template_kwargs, "data")
    template = None if chat.tokenizer is None else chat.tokenizer.chat_template
    if not template or not arguments:
        return chat
    if isinstance(template, str):
        return chat.with_template(with_arguments(template, arguments))
    named = {name: with_arguments(source, arguments) for name, source in template.items()}
    return chat.with_template(named)


def _write(run: RunDirectory, chat: Chat, ends: tuple[int, ...] | list[int], clock: Any) -> None:
    template = None if chat.tokenizer is None else chat.tokenizer.chat_template
    content = {"chat_template": template, "eos_token_id": list(ends), "clock": clock.isoformat()}
    run.write_chat(content)


def _kept(run: RunDirectory, base: Chat) -> Chat:
    content = read_json(run.chat)
    chat = base.with_template(content.get("chat_template"))
    clock = read_clock(content.get("clock", ""), f"{run.chat}: clock")
    return dataclasses.replace(chat.ending_with(content.get("eos_token_id", ())), clock=clock)
