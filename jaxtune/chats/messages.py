"""Conversations: what a row's turns are, and which of them are learnt."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtune.chats.jsontext import parse_exact_numbers, parse_json_text, restore_numbers
from jaxtune.chats.reasoning import (
    REASONING_KEYS,
    fold_reasoning,
    separate_reasoning,
    split_content,
)
from jaxtune.errors import JaxtuneError, closest

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = Mapping[str, Any]

# What a turn may say beside its role and its content.
_MARKS = ("train", "weight")
_OF_ASSISTANT = ("tool_calls", *REASONING_KEYS)
_OF_TOOL = ("tool_call_id", "name")
# What apply_chat_template is called with: not for a row to say.
_OWN_ARGUMENTS = frozenset(
    (
        *("conversation", "conversations", "messages", "tools", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
_ALIKE = 0.8  # a key as similar as this to a known one is a spelling mistake


class Conversation(NamedTuple):
    """Turns as a template takes them.

    Attributes:
      turns: role and content, the assistant's perhaps with tool_calls and reasoning, and the keys
        that only a template may know. Content may be None beside tool_calls.
      marks: by turn, whether the row says that it is to be learnt; None where it does not say.
      tools: the functions that the assistant may call, as JSON schemas.
      arguments: of the template, such as ``{"enable_thinking": False}``.
      extra: the keys of turns that only a template may know.
    """

    turns: list[dict[str, Any]]
    marks: list[bool | None]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = {}
    extra: frozenset[str] = frozenset()


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


def read_conversation(
    messages: Any, place: str, tools: Any = None, arguments: Any = None
) -> Conversation:
    """Checks a conversation in the form of OpenAI's and Hugging Face's chats.

    Args:
      messages: objects with role and content, or JSON text of them; an assistant's may have
        tool_calls and reasoning (`REASONING_KEYS`), any ``train`` (true or false) or ``weight``
        (0 or 1).
      place: what to call the conversation in an error.
      tools: descriptions of functions, or JSON text of them, or None.
      arguments: of the template, an object, or JSON text of one, or None.

    Raises:
      JaxtuneError: what is missing or of the wrong type; the message names it.
    """
    messages = parse_json_text(messages, f"{place}: messages")
    if not isinstance(messages, (list, tuple)) or not messages:
        raise JaxtuneError(f"{place}: messages must be a list of one or more turns")
    turns, marks, extra = [], [], set[str]()
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise JaxtuneError(f"{place}: {name} must be an object with role and content")
        given = {key: value for key, value in message.items() if value is not None}
        turn, others = _read_turn(given, name, place)
        marks.append(_read_mark(given, turn["role"], name, place))
        turns.append(turn)
        extra |= others
    tools = parse_json_text(tools, f"{place}: tools") if tools else None
    if tools is not None and not (isinstance(tools, list) and all(map(tool_name, tools))):
        raise JaxtuneError(f"{place}: tools must be a list of objects, as JSON schemas are")
    return Conversation(
        turns, marks, tools or None, read_arguments(arguments, place), frozenset(extra)
    )


def read_arguments(value: Any, place: str, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Returns the arguments of a template: an object or JSON text of one; raises naming `place`."""
    arguments = parse_json_text(value, f"{place}: {name}") if value else {}
    if not isinstance(arguments, Mapping):
        raise JaxtuneError(f"{place}: {name} must be a JSON object")
    if taken := sorted(set(arguments) & _OWN_ARGUMENTS):
        raise JaxtuneError(f"{place}: {name} may not set {taken[0]}: jaxtune itself does")
    # A table of `datasets` gives every row every key.
    return {key: given for key, given in arguments.items() if given is not None}


def tool_name(tool: Any) -> str:
    """Returns the name of a function that a JSON schema describes, or an empty string."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _read_turn(given: Message, name: str, place: str) -> tuple[dict[str, Any], set[str]]:
    """Returns a turn, and those of its keys that are not known here."""
    role = given.get("role")
    calls = role == "assistant" and bool(given.get("tool_calls"))
    # The same as content of nothing but a think block.
    reasons = role == "assistant" and any(str(given.get(key, "")).strip() for key in REASONING_KEYS)
    for key in ("role",) if calls or reasons else ("role", "content"):
        if key not in given:
            hint = ": write its function_call as tool_calls" if "function_call" in given else ""
            raise JaxtuneError(f"{place}: {name} has no {key}{hint}")
    if role not in ROLES:
        raise JaxtuneError(
            f'{place}: {name}.role="{role}" is unknown{closest(str(role), ROLES)} '
            f"(known: {', '.join(ROLES)})"
        )
    more = {"assistant": _OF_ASSISTANT, "tool": _OF_TOOL}.get(str(role), ())
    known = ("role", "content", *_MARKS, *more)
    others = {str(key) for key in given} - {*known, *_OF_ASSISTANT, *_OF_TOOL}
    for key in sorted(others):
        if meant := _closest_key(key, known, given):
            raise JaxtuneError(
                f'{place}: {name} has the key "{key}"; did you mean "{meant}"? (a turn of this '
                f"role has {', '.join(known)})"
            )
    others |= {key for key in (*_OF_ASSISTANT, *_OF_TOOL) if key in given and key not in known}
    turn: dict[str, Any] = {"role": role, "content": None}
    if "content" in given:
        turn["content"] = _read_content(given["content"], name, place, result=role == "tool")
    if role == "assistant":
        if not (calls or reasons or (turn["content"] or "").strip()):
            raise JaxtuneError(f"{place}: {name} is an empty assistant turn")
        turn |= _read_reasoning(given, turn["content"], name, place)
    if calls:
        turn["tool_calls"] = _read_tool_calls(given["tool_calls"], name, place)
    if role == "tool":
        turn |= {
            key: check_text(given[key], f"{name}.{key}", place) for key in more if key in given
        }
    for key in others:
        if isinstance(given[key], str):
            check_text(given[key], f"{name}.{key}", place)
    return turn | {key: given[key] for key in others if key != "tool_calls"}, others


def _closest_key(key: str, known: Sequence[str], given: Message) -> str:
    """Returns the known key of which another is a misspelling; empty where it is none."""
    plain = unicodedata.normalize("NFKD", key.casefold()).encode("ascii", "ignore").decode()
    if plain in known:
        return plain
    near = difflib.get_close_matches(key, [k for k in known if k not in given], 1, _ALIKE)
    return near[0] if near else ""


def _read_content(value: Any, name: str, place: str, *, result: bool = False) -> str:
    parts = isinstance(value, list)
    if result and not isinstance(value, str) and not (parts and all(map(_has_type, value))):
        kind = type(value).__name__
        raise JaxtuneError(
            f"{place}: {name}.content must be a string, not {kind}: write the tool's result as "
            "JSON text"
        )
    if not parts:
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


def _has_type(part: Any) -> bool:
    return isinstance(part, Mapping) and "type" in part


def _read_reasoning(given: Message, content: str | None, name: str, place: str) -> dict[str, str]:
    found = {
        key: check_text(given[key], f"{name}.{key}", place)
        for key in REASONING_KEYS
        if key in given
    }
    said = {key: text for key, text in found.items() if text.strip()}
    if len(set(said.values())) > 1:
        raise JaxtuneError(f"{place}: {name} has different reasoning in {' and '.join(said)}")
    if said and split_content(content or "", opened=True)[1] != (content or ""):
        raise JaxtuneError(
            f"{place}: {name} has reasoning both in its content and in {next(iter(said))}"
        )
    return found


def _read_tool_calls(calls: Any, name: str, place: str) -> list[dict[str, Any]]:
    """Returns calls with their arguments as the row has them: an object, or JSON text of one."""
    calls = parse_json_text(calls, f"{place}: {name}.tool_calls")
    if not isinstance(calls, list):
        raise JaxtuneError(f"{place}: {name}.tool_calls must be a list")
    found = []
    for index, call in enumerate(calls):
        where = f"{name}.tool_calls[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or "name" not in function:
            raise JaxtuneError(f"{place}: {where} must have a function with name and arguments")
        arguments = function.get("arguments")
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}
        if isinstance(arguments, str) and not arguments.lstrip().startswith(("{", "[")):
            raise JaxtuneError(f"{place}: {where}: arguments are no JSON")
        if not isinstance(
            parse_json_text(arguments, f"{place}: {where}: arguments are no JSON"), Mapping
        ):
            raise JaxtuneError(f"{place}: {where}: arguments must be a JSON object")
        called = check_text(function["name"], f"{where}.name", place)
        entry = {"type": "function", "function": {"name": called, "arguments": arguments}}
        found.append(({"id": call["id"]} if call.get("id") else {}) | entry)
    return found


def read_function_calls(value: Any, place: str) -> Any:
    """Returns the calls that ShareGPT's function_call has as JSON text: one, or a list of them.

    Arguments are text afterwards, so that their numbers stay as they were written.
    """
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    parsed = parse_json_text(value, f"{place} is a function call that is no JSON")
    if isinstance(parsed, str):
        raise JaxtuneError(f"{place} is a function call that is no JSON")
    numbers: dict[str, str] = {}
    found = parse_exact_numbers(value, value, numbers)
    for call in found if isinstance(parsed, list) else [found]:
        if isinstance(call, dict) and isinstance(call.get("arguments"), dict):
            text = json.dumps(call["arguments"], ensure_ascii=False)
            call["arguments"] = restore_numbers(text, numbers)
    return found if isinstance(found, list) else [found]


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
    """Returns which turns are learnt; a first turn of the assistant is not, as it answers nothing.

    Args:
      conversation: with its marks.
      targets: ``all`` (of the assistant, but those marked false), ``last`` (the assistant's last,
        unless marked false) or ``marked`` (those marked true).
      place: what to call the conversation in an error.

    Raises:
      JaxtuneError: no turn is learnt, or the first turn is marked true.
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
    if 0 in learnt and (marks[0] or learnt == [0]):
        raise JaxtuneError(
            f"{place}: messages[0] is an assistant turn that answers nothing, so it cannot be "
            'learnt: put a user turn before it, or give it "train": false and learn a later one'
        )
    learnt = [index for index in learnt if index]
    if not learnt:
        raise JaxtuneError(
            f"{place}: no turn to learn: train or weight leaves none with data.targets={targets}"
        )
    return learnt


def canonical_content(conversation: Conversation) -> bytes:
    """Returns the words of a conversation: equal for two that differ in their spelling alone."""
    said = []
    for turn in conversation.turns:
        within, answer = split_content(turn["content"] or "", opened=False)
        if within and not separate_reasoning(turn):
            turn = {**turn, REASONING_KEYS[0]: within, "content": answer}
        turn = {k: v for k, v in fold_reasoning(turn).items() if k not in conversation.extra}
        if turn["role"] == "developer":
            turn["role"] = "system"
        if calls := turn.get("tool_calls"):
            turn["tool_calls"] = [
                {**call, "function": _parse_arguments(call["function"])} for call in calls
            ]
        said.append(turn)
    text = json.dumps([said, conversation.tools], ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _parse_arguments(function: Message) -> dict[str, Any]:
    return {**function, "arguments": parse_json_text(function["arguments"], "arguments")}
