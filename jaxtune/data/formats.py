"""The forms that a row of training data may have; a new one is an entry of `FORMATS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxtune.data.read import Row
from jaxtune.data.template import ChatTemplate, Tokenized, check_text, tokenize
from jaxtune.errors import JaxtuneError, closest


@dataclasses.dataclass(frozen=True)
class DataFormat:
    """One form of rows.

    Attributes:
      keys: what a row of this form must have; other keys are metadata, which nobody reads.
      encode: gives a row's tokens and labels, with the template (None without a tokenizer).
      optional: keys that are read where a row has them.
    """

    keys: tuple[str, ...]
    encode: Callable[[Row, ChatTemplate | None], Tokenized]
    optional: tuple[str, ...] = ()


def _needed(template: ChatTemplate | None, row: Row) -> ChatTemplate:
    if template is None:
        raise JaxtuneError(
            f"{row.place}: text needs a tokenizer and the checkpoint has none; "
            "without one, rows are input_ids + labels"
        )
    return template


def _encode_messages(row: Row, template: ChatTemplate | None) -> Tokenized:
    return _needed(template, row).encode(row.values["messages"], row.place)


def _encode_completion(row: Row, template: ChatTemplate | None) -> Tokenized:
    tokenizer = _needed(template, row).tokenizer
    prompt = check_text(row.values["prompt"], "prompt", row.place)
    completion = check_text(row.values["completion"], "completion", row.place)
    if not completion.strip():
        raise JaxtuneError(f"{row.place}: empty completion, so nothing to learn")
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise JaxtuneError(f"{row.place}: the tokenizer has no EOS token to end a completion with")
    text = prompt + completion
    tokens, labels = tokenize(tokenizer, text, [(len(prompt), len(text))], add_special_tokens=True)
    tokens, labels = list(tokens), list(labels)
    if tokens[-1] != end:
        tokens.append(end)
        labels.append(end)
    labels[-1] = end  # also where the tokenizer itself ends every text with EOS
    return Tokenized(tokens, labels)


def _integers(value: Any, name: str, place: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise JaxtuneError(f"{place}: {name} must be a list of integers")
    return value


def _encode_tokenized(row: Row, template: ChatTemplate | None) -> Tokenized:
    tokens = _integers(row.values["input_ids"], "input_ids", row.place)
    labels = _integers(row.values["labels"], "labels", row.place)
    if len(tokens) != len(labels):
        raise JaxtuneError(
            f"{row.place}: input_ids has {len(tokens)} entries and labels {len(labels)}"
        )
    mask = row.values.get("attention_mask")
    if mask is not None and (not isinstance(mask, list) or mask != [1] * len(tokens)):
        raise JaxtuneError(
            f"{row.place}: attention_mask must be 1 everywhere: leave padding out of the rows"
        )
    return Tokenized(tokens, labels)


FORMATS: dict[str, DataFormat] = {
    "messages": DataFormat(("messages",), _encode_messages),
    "prompt-completion": DataFormat(("prompt", "completion"), _encode_completion),
    "tokenized": DataFormat(("input_ids", "labels"), _encode_tokenized, ("attention_mask",)),
}


def detect(row: Row) -> str:
    """Returns the name in `FORMATS` of the one form whose keys the row has.

    Raises:
      JaxtuneError: none fits, or more than one; the message names the keys found and the forms.
    """
    # A table of `datasets` gives every row every key, with None where the row had none.
    found = [key for key, value in row.values.items() if value is not None]
    fitting = [name for name, form in FORMATS.items() if set(form.keys) <= set(found)]
    if len(fitting) == 1:
        return fitting[0]
    forms = ", ".join(f"{name} ({' + '.join(form.keys)})" for name, form in FORMATS.items())
    keys = ", ".join(found) or "none"
    if fitting:
        raise JaxtuneError(f"{row.place}: the keys {keys} fit more than one form of: {forms}")
    known = [key for form in FORMATS.values() for key in form.keys]
    hints = [hint for key in found if key not in known and (hint := closest(key, known))]
    raise JaxtuneError(
        f"{row.place}: the keys {keys} fit no known form{hints[0] if hints else ''} "
        f"(known: {forms})"
    )


def unread_keys(row: Row, form: str) -> set[str]:
    """Returns the keys of a row that its form does not read."""
    return set(row.values) - set(FORMATS[form].keys) - set(FORMATS[form].optional)
