"""The settings of the ``data`` section that tokens and targets depend on."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.chats.messages import read_arguments
from jaxtune.chats.template import ChatTemplate, read_template
from jaxtune.data.fitting import TOO_LONG
from jaxtune.data.row_formats import FORMATS
from jaxtune.data.samples import ReadingOptions
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TARGETS, REASONING, BAD_ROWS = ("all", "last", "marked"), ("keep", "drop"), ("error", "skip")
EMPTY_REASONING = ("learn", "mask")
PROMPT = "{prompt}"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What of a config the tokens and targets of a data set depend on.

    Attributes:
      max_length: most tokens of an example.
      too_long: what becomes of a longer one: ``error``, ``drop``, ``truncate`` (its end),
        ``truncate_start`` or ``windows`` (several examples of at most so many tokens).
      chat_template: a Jinja file or the name of a built-in template, used in place of the
        tokenizer's own; empty: its own.
      chat_template_kwargs: arguments of the template, as JSON text; empty: none.
      vocab_size: token ids are below this; None: unchecked.
      format: the form of all rows; empty: that which their keys fit.
      targets: the turns that are learnt: ``all``, ``last`` or ``marked``.
      reasoning: ``keep`` or ``drop``.
      empty_reasoning: ``learn`` or ``mask``.
      prompt_templates: a file with a wording on each line, with ``{prompt}`` in it; empty: none.
      seed: of the choice among wordings.
      bad_rows: ``error`` or ``skip``.
      bad_rows_limit: most rows that may be skipped.
      clock: the time that a template prints; None: that of each rendering.
      template_text: Jinja source in place of ``chat_template``; empty: none.
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
        """Refuses what none of the choices is."""
        for name, choices in (
            ("too_long", TOO_LONG),
            ("targets", TARGETS),
            ("reasoning", REASONING),
            ("empty_reasoning", EMPTY_REASONING),
            ("bad_rows", BAD_ROWS),
            ("format", ("", *FORMATS)),
        ):
            if (value := getattr(self, name)) not in choices:
                known = ", ".join(filter(None, choices))
                raise JaxtuneError(f"data.{name} takes one of {known}, not {value!r}")

    def reading(self, tokenizer: PreTrainedTokenizerBase | None) -> ReadingOptions:
        """Returns how rows are read with a tokenizer."""
        template = None
        if tokenizer is not None:
            arguments = read_arguments(self.chat_template_kwargs, "data", "chat_template_kwargs")
            source = self.template_text or read_template(self.chat_template)
            template = ChatTemplate(tokenizer, source, arguments, self.clock)
        wordings = read_prompt_templates(self.prompt_templates)
        how = (self.targets, self.reasoning, self.empty_reasoning)
        return ReadingOptions(template, *how, wordings, self.seed)


def read_prompt_templates(path: str) -> tuple[str, ...]:
    """Reads the wordings that prompts are put into: one a line, with ``{prompt}`` in it.

    Raises:
      JaxtuneError: no such file, or a line without ``{prompt}``.
    """
    if not path:
        return ()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise JaxtuneError(f"data.prompt_templates={path}: {reason}") from error
    for number, line in enumerate(lines, 1):
        if line.strip() and PROMPT not in line:
            raise JaxtuneError(f"{path}:{number}: a wording needs {PROMPT} in it")
    wordings = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if not wordings:
        raise JaxtuneError(f"data.prompt_templates={path}: no wordings")
    return wordings


def data_settings(section: Any, *, seed: int, vocab_size: int | None) -> DataSettings:
    """Returns the settings that the ``data`` section of a config makes."""
    fields = {field.name for field in dataclasses.fields(DataSettings)}
    others = {"seed", "vocab_size", "clock", "template_text"}
    values = {name: section[name] for name in fields - others}
    return DataSettings(**values, seed=seed, vocab_size=vocab_size)
