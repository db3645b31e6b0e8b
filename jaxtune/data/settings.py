"""The settings that the tokens and targets of a data set depend on."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtune.chats.messages import read_arguments
from jaxtune.chats.template import ChatTemplate, read_template
from jaxtune.config import OPTIONS, DataConfig
from jaxtune.data.samples import ReadingOptions
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = "{prompt}"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Settings that the tokens and targets of a data set depend on.

    Attributes:
      max_length: maximum number of tokens of an example.
      too_long: treatment of longer rows: ``error``, ``drop``, ``truncate`` (the end),
        ``truncate_start`` or ``windows`` (several examples of at most `max_length` tokens).
      chat_template: Jinja file or name of a built-in template; empty: the tokenizer's own.
      chat_template_kwargs: template arguments, as JSON text; empty: none.
      vocab_size: upper bound of token ids; None: unchecked.
      format: format of all rows, a key of `ROW_FORMATS`; empty: detected from their keys.
      targets: assistant turns that are trained on: ``all``, ``last`` or ``marked``.
      reasoning: ``keep`` or ``drop``.
      empty_reasoning: ``learn`` or ``mask``.
      prompt_templates: file of prompt templates, one per line, each with ``{prompt}``; empty: none.
      seed: random seed for the choice among prompt templates.
      bad_rows: ``error`` or ``skip``.
      bad_rows_limit: maximum number of skipped rows.
      clock: time that a chat template prints; None: the time of rendering.
      template_text: Jinja source used instead of ``chat_template``; empty: none.
    """

    max_length: int
    too_long: str = "error"
    chat_template: str = ""
    chat_template_kwargs: str = ""
    vocab_size: int | None = None
    format: str = ""
    targets: str = "all"
    reasoning: str = "keep"
    empty_reasoning: str = "learn"
    prompt_templates: str = ""
    seed: int = 0
    bad_rows: str = "error"
    bad_rows_limit: int = 100
    clock: datetime.datetime | None = None
    template_text: str = ""

    def __post_init__(self) -> None:
        """Raises if a setting is not one of its choices."""
        for name in ("too_long", "targets", "reasoning", "empty_reasoning", "bad_rows", "format"):
            key = f"data.{name}"
            OPTIONS[key].check(key, getattr(self, name))

    def reading(self, tokenizer: PreTrainedTokenizerBase | None) -> ReadingOptions:
        """Returns the options for reading rows with a tokenizer."""
        template = None
        if tokenizer is not None:
            arguments = read_arguments(self.chat_template_kwargs, "data", "chat_template_kwargs")
            source = self.template_text or read_template(self.chat_template)
            template = ChatTemplate(tokenizer, source, arguments, self.clock)
        wordings = read_prompt_templates(self.prompt_templates)
        how = (self.targets, self.reasoning, self.empty_reasoning)
        return ReadingOptions(template, *how, wordings, self.seed)


def read_prompt_templates(path: str) -> tuple[str, ...]:
    """Reads a file with one prompt template per line, each of which contains ``{prompt}``.

    Raises:
      JaxtuneError: the file cannot be read, or a line does not contain ``{prompt}``.
    """
    if not path:
        return ()
    try:
        lines = read_text(Path(path).expanduser()).splitlines()
    except (JaxtuneError, RuntimeError) as error:  # the user of ~user does not exist
        raise JaxtuneError(f"data.prompt_templates={path}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and PROMPT not in line:
            raise JaxtuneError(f"{path}:{number}: a prompt template must contain {PROMPT}")
    wordings = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if not wordings:
        raise JaxtuneError(f"data.prompt_templates={path}: the file has no prompt templates")
    return wordings


def data_settings(section: DataConfig, *, seed: int, vocab_size: int | None) -> DataSettings:
    """Returns the settings of the ``data`` section of a config."""
    fields = {field.name for field in dataclasses.fields(DataSettings)}
    others = {"seed", "vocab_size", "clock", "template_text"}
    values = {name: getattr(section, name) for name in fields - others}
    return DataSettings(**values, seed=seed, vocab_size=vocab_size)
