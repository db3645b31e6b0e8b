"""Row formats of training data; `jaxtune.registry.ROW_FORMATS` lists them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.chats.jsontext import parse_json_text
from jaxtune.chats.messages import Conversation, check_text, read_conversation, read_function_calls
from jaxtune.chats.rendering import Steps
from jaxtune.chats.tokens import Tokenized
from jaxtune.data.rows import Row
from jaxtune.data.samples import ReadingOptions, Sample, conversation_sample
from jaxtune.errors import JaxtuneError, closest

_ARGUMENTS = "chat_template_kwargs"


@dataclasses.dataclass(frozen=True)
class DataFormat:
    """A row format.

    Attributes:
      keys: required keys; keys that are neither required nor optional are ignored.
      read: converts a row to a `Sample`, in steps if it renders a conversation.
      optional: optional keys.
    """

    keys: tuple[str, ...]
    read: Callable[[Row, ReadingOptions], Sample | Steps[Sample]]
    optional: tuple[str, ...] = ()


def _content_key(*values: Any) -> bytes:
    """Returns the content of a row as bytes, equal for duplicate rows."""
    return json.dumps(values, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")


def _conversation(messages: Any, row: Row, tools: bool = True) -> Conversation:
    values = row.values
    return read_conversation(
        messages,
        row.place,
        values.get("tools") if tools else None,
        values.get(_ARGUMENTS),
    )


def _read_messages(row: Row, reading: ReadingOptions) -> Steps[Sample]:
    return conversation_sample(_conversation(row.values["messages"], row), reading, row.place)


def _read_completion(row: Row, reading: ReadingOptions) -> Sample | Steps[Sample]:
    prompt, completion = row.values["prompt"], row.values["completion"]
    if (asked := _parse_turns(prompt)) and (answered := _parse_turns(completion)):
        prompt, completion = asked, answered
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = read_conversation(prompt, f"{row.place}: prompt")
        answered = read_conversation(
            completion,
            f"{row.place}: completion",
            row.values.get("tools"),
            row.values.get(_ARGUMENTS),
        )
        # The prompt is not trained on, including its assistant turns.
        both = [*asked.turns, *answered.turns]
        marks = [*[False] * len(asked.turns), *answered.marks]
        joined = answered._replace(turns=both, marks=marks, extra=asked.extra | answered.extra)
        return conversation_sample(joined, reading, row.place)
    prompt = check_text(prompt, "prompt", row.place)
    completion = check_text(completion, "completion", row.place)
    if not completion.strip():
        raise JaxtuneError(f"{row.place}: empty completion, nothing to train on")
    reading.require_template(row.place, ends=True)
    content = _content_key(prompt, completion)
    completion, turns = reading.answer(prompt, completion, row.place)
    prompt = reading.apply_wording(prompt, content)
    text = prompt + completion
    # A prompt and completion as strings are not rendered, so no template sees these keys.
    unread = frozenset(key for key in ("tools", _ARGUMENTS) if row.values.get(key))
    spans = [(len(prompt), len(text))]
    return Sample(content, text, spans, ends=True, unread=unread, turns=turns)


def _parse_turns(text: Any) -> list[Any] | None:
    """Returns turns given as JSON text, such as a CSV cell; None for any other value."""
    if not isinstance(text, str) or not text.lstrip().startswith("[") or '"role"' not in text:
        return None
    try:
        turns = parse_json_text(text, "turns")
    except JaxtuneError:
        return None
    return turns if all(isinstance(turn, Mapping) and "role" in turn for turn in turns) else None


def _read_alpaca(row: Row, reading: ReadingOptions) -> Steps[Sample]:
    asked = check_text(row.values["instruction"], "instruction", row.place)
    given = row.values.get("input")
    if given is not None and check_text(given, "input", row.place).strip():
        asked += f"\n\n{given}"
    turns = [*_history(row), {"role": "user", "content": asked}]
    output = check_text(row.values["output"], "output", row.place)
    turns.append({"role": "assistant", "content": output})
    if row.values.get("system"):
        turns.insert(0, {"role": "system", "content": row.values["system"]})
    return conversation_sample(_conversation(turns, row, tools=False), reading, row.place)


def _history(row: Row) -> list[dict[str, Any]]:
    """Returns the turns of ``history``; its answers are trained on, like ``output``."""
    rounds = parse_json_text(row.values.get("history") or [], f"{row.place}: history")
    turns: list[dict[str, Any]] = []
    for index, pair in enumerate(rounds if isinstance(rounds, list) else [None]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise JaxtuneError(f"{row.place}: history must be a list of [question, answer] pairs")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            content = check_text(said, f"history[{index}]", row.place)
            turns.append({"role": role, "content": content})
    return turns


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def _read_sharegpt(row: Row, reading: ReadingOptions) -> Steps[Sample]:
    said = parse_json_text(row.values["conversations"], f"{row.place}: conversations")
    turns: list[Any] = []
    if not isinstance(said, list) or not all(isinstance(turn, Mapping) for turn in said):
        raise JaxtuneError(f"{row.place}: conversations must be a list of objects")
    for index, turn in enumerate(said):
        if "role" in turn:  # many ShareGPT files use OpenAI's keys
            turns.append(turn)
            continue
        name, kept = f"conversations[{index}]", dict(turn)
        for key in ("from", "value"):
            if kept.get(key) is None:
                raise JaxtuneError(f'{row.place}: {name} has no key "{key}"')
        speaker, value = kept.pop("from"), kept.pop("value")
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise JaxtuneError(
                f'{row.place}: {name}.from="{speaker}" is unknown'
                f"{closest(str(speaker), _SPEAKERS)} (known: {', '.join(_SPEAKERS)})"
            )
        kept |= {"role": _SPEAKERS[speaker], "content": value}
        if speaker == "function_call":
            kept["tool_calls"] = read_function_calls(value, f"{row.place}: {name}.value")
            del kept["content"]
        turns.append(kept)
    if row.values.get("system"):
        turns.insert(0, {"role": "system", "content": row.values["system"]})
    return conversation_sample(_conversation(turns, row), reading, row.place)


def _read_text(row: Row, reading: ReadingOptions) -> Sample:
    text = check_text(row.values["text"], "text", row.place)
    if not text.strip():
        raise JaxtuneError(f"{row.place}: empty text, nothing to train on")
    reading.require_template(row.place, ends=True)
    return Sample(_content_key(text), text, [(0, len(text))], ends=True)


def _integers(value: Any, name: str, place: str) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise JaxtuneError(f"{place}: {name} must be a list of integers")
    return value


def _read_tokenized(row: Row, reading: ReadingOptions) -> Sample:
    tokens = _integers(row.values["input_ids"], "input_ids", row.place)
    labels = _integers(row.values["labels"], "labels", row.place)
    if len(tokens) != len(labels):
        raise JaxtuneError(
            f"{row.place}: input_ids and labels differ in length: {len(tokens)} and {len(labels)}"
        )
    mask = row.values.get("attention_mask")
    if mask is not None and (not isinstance(mask, list) or mask != [1] * len(tokens)):
        raise JaxtuneError(
            f"{row.place}: attention_mask must be all ones; remove the padding from the rows"
        )
    return Sample(_content_key(tokens), tokens=Tokenized(tokens, labels))


MESSAGES = DataFormat(("messages",), _read_messages, ("tools", _ARGUMENTS))
PROMPT_COMPLETION = DataFormat(("prompt", "completion"), _read_completion, ("tools", _ARGUMENTS))
ALPACA = DataFormat(
    ("instruction", "output"), _read_alpaca, ("input", "system", "history", _ARGUMENTS)
)
SHAREGPT = DataFormat(("conversations",), _read_sharegpt, ("system", "tools", _ARGUMENTS))
TEXT = DataFormat(("text",), _read_text)
TOKENIZED = DataFormat(("input_ids", "labels"), _read_tokenized, ("attention_mask",))
