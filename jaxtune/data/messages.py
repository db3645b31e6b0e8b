"""Conversations: what a row's turns are, which of them are learnt, and their reasoning."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.errors import JaxtuneError, closest

ROLES = ("system", "user", "assistant", "tool")
THINK, END_THINK = "<think>", "</think>"

Message = Mapping[str, Any]

# What a turn may say beside its role and its content.
_MARKS = ("train", "weight")
_OF_ASSISTANT = ("tool_calls", "reasoning_content")
_OF_TOOL = ("tool_call_id", "name")
_REASONING = re.compile(r"\s*(?:<think>)?.*?</think>\s*", re.DOTALL)


class Conversation(NamedTuple):
    """Turns as a template takes them.

    Attributes:
      turns: role and content, the assistant's perhaps with tool_calls. Content may be None there.
      marks: by turn, whether the row says that it is to be learnt; None where it does not say.
      tools: the functions that the assistant may call, as JSON schemas.
    """

    turns: list[dict[str, Any]]
    marks: list[bool | None]
    tools: list[Any] | None = None


def check_text(value: Any, name: str, place: str) -> str:
    """Returns `value` if it is a string that can be tokenized; raises naming `place` if not."""
    if not isinstance(value, str):
        raise JaxtuneError(f"{place}: {name} must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # Readers of text files put bytes that are no UTF-8 into this range.
        raw = "\udc80" <= value[error.start] <= "\udcff"
        what = "is not UTF-8" if raw else "holds half a surrogate pair"
        raise JaxtuneError(f"{place}: {name} {what}") from error
    return value


def check_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    """Returns the turns of a conversation; raises naming `place`."""
    return read_conversation(messages, place).turns


def read_conversation(messages: Any, place: str, tools: Any = None) -> Conversation:
    """Checks a conversation in the form of OpenAI's and Hugging Face's chats.

    Args:
      messages: objects with role and content; an assistant's may have tool_calls and
        reasoning_content, any ``train`` (true or false) or ``weight`` (0 or 1).
      place: what to call the conversation in an error.
      tools: descriptions of functions, or None.

    Raises:
      JaxtuneError: what is missing, unknown or of the wrong type; the message names it.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise JaxtuneError(f"{place}: messages must be a list of one or more turns")
    turns, marks = [], []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise JaxtuneError(f"{place}: {name} must be an object with role and content")
        given = {key: value for key, value in message.items() if value is not None}
        turn = _read_turn(given, name, place)
        marks.append(_read_mark(given, turn["role"], name, place))
        turns.append(turn)
    if tools is not None and not (isinstance(tools, list) and all(map(tool_name, tools))):
        raise JaxtuneError(f"{place}: tools must be a list of objects, as JSON schemas are")
    return Conversation(turns, marks, tools or None)


def tool_name(tool: Any) -> str:
    """Returns the name of a function that a JSON schema describes, or an empty string."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _read_turn(given: Message, name: str, place: str) -> dict[str, Any]:
    role = given.get("role")
    calls = role == "assistant" and bool(given.get("tool_calls"))
    for key in ("role",) if calls else ("role", "content"):
        if key not in given:
            raise JaxtuneError(f"{place}: {name} has no {key}")
    if role not in ROLES:
        raise JaxtuneError(
            f'{place}: {name}.role="{role}" is unknown{closest(str(role), ROLES)} '
            f"(known: {', '.join(ROLES)})"
        )
    more = {"assistant": _OF_ASSISTANT, "tool": _OF_TOOL}.get(str(role), ())
    known = {"role", "content", *_MARKS, *more}
    if unknown := sorted(key for key in given if key not in known):
        raise JaxtuneError(
            f'{place}: {name} has the key "{unknown[0]}"; a turn of this role has '
            f"{', '.join(sorted(known))}"
        )
    content = _content(given["content"], name, place) if "content" in given else None
    if role == "assistant":
        if not calls and not (content or "").strip():
            raise JaxtuneError(f"{place}: {name} is an empty assistant turn")
        if "reasoning_content" in given:
            content = _with_reasoning(given["reasoning_content"], content, name, place)
    turn: dict[str, Any] = {"role": role, "content": content}
    if calls:
        turn["tool_calls"] = _read_calls(given["tool_calls"], name, place)
    if role == "tool":
        turn |= {
            key: check_text(given[key], f"{name}.{key}", place) for key in more if key in given
        }
    return turn


def _content(value: Any, name: str, place: str) -> str:
    if not isinstance(value, list):
        return check_text(value, f"{name}.content", place)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise JaxtuneError(
                f"{place}: {name}.content[{index}] is of type {kind}; only text can be trained on"
            )
        texts.append(check_text(part.get("text"), f"{name}.content[{index}].text", place))
    return "".join(texts)


def _with_reasoning(reasoning: Any, content: str | None, name: str, place: str) -> str:
    reasoning = check_text(reasoning, f"{name}.reasoning_content", place)
    if END_THINK in (content or ""):
        raise JaxtuneError(
            f"{place}: {name} has reasoning both in its content and in reasoning_content"
        )
    return f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{content or ''}"


def _read_calls(calls: Any, name: str, place: str) -> list[dict[str, Any]]:
    """Returns calls with arguments as objects, which is how Hugging Face's templates take them."""
    if not isinstance(calls, list):
        raise JaxtuneError(f"{place}: {name}.tool_calls must be a list")
    found = []
    for index, call in enumerate(calls):
        where = f"{name}.tool_calls[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise JaxtuneError(f"{place}: {where} must have a function with name and arguments")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise JaxtuneError(f"{place}: {where}: arguments are no JSON") from error
        if not isinstance(arguments, Mapping):
            raise JaxtuneError(f"{place}: {where}: arguments must be a JSON object")
        called = check_text(function["name"], f"{where}.name", place)
        entry = {"type": "function", "function": {"name": called, "arguments": arguments}}
        found.append(({"id": call["id"]} if call.get("id") else {}) | entry)
    return found


def _read_mark(given: Message, role: str, name: str, place: str) -> bool | None:
    marks = [given[key] for key in _MARKS if key in given]
    if not marks:
        return None
    if len(marks) > 1 or marks[0] not in (0, 1):  # True and 1.0 are 1
        raise JaxtuneError(f"{place}: {name} takes train (true or false) or weight (0 or 1)")
    if role != "assistant" and marks[0]:
        raise JaxtuneError(f"{place}: {name} is a {role} turn, and only the assistant's are learnt")
    return bool(marks[0])


def choose_targets(conversation: Conversation, targets: str, place: str) -> list[int]:
    """Returns which turns are learnt.

    Args:
      conversation: with its marks.
      targets: ``all`` (of the assistant, but those marked false), ``last`` (the assistant's last,
        unless marked false) or ``marked`` (those marked true).
      place: what to call the conversation in an error.

    Raises:
      JaxtuneError: no turn is learnt.
    """
    roles = [turn["role"] for turn in conversation.turns]
    chosen = [index for index, role in enumerate(roles) if role == "assistant"]
    if not chosen:
        raise JaxtuneError(f"{place}: no assistant turn, so nothing to learn")
    if targets == "last":
        chosen = chosen[-1:]
    unmarked = targets != "marked"
    marks = conversation.marks
    learnt = [i for i in chosen if marks[i] or (marks[i] is None and unmarked)]
    if not learnt:
        raise JaxtuneError(
            f"{place}: no turn to learn: train or weight leaves none with data.targets={targets}"
        )
    return learnt


def without_reasoning(turns: Sequence[Message]) -> list[dict[str, Any]]:
    """Returns the turns with what the assistant's contents say up to ``</think>`` taken away."""
    return [
        {**turn, "content": _REASONING.sub("", turn["content"], count=1)}
        if turn["role"] == "assistant" and END_THINK in (turn["content"] or "")
        else dict(turn)
        for turn in turns
    ]
