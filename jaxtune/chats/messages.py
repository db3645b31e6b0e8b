"""Conversations: the turns of a row, and the choice of turns to train on."""

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

# Keys of a turn in addition to role and content.
_MARKS = ("train", "weight")
_OF_ASSISTANT = ("tool_calls", *REASONING_KEYS)
_OF_TOOL = ("tool_call_id", "name")
# Arguments of apply_chat_template that jaxtune sets and rows must not set.
_OWN_ARGUMENTS = frozenset(
    (
        *("conversation", "conversations", "messages", "tools", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
_ALIKE = 0.8  # similarity at which an unknown key counts as a misspelling of a known one


class Conversation(NamedTuple):
    """A checked conversation.

    Attributes:
      turns: turns with role, content and extra keys; assistant turns may have tool_calls and
        reasoning, and may then have None as content.
      marks: value of ``train`` or ``weight`` of each turn; None if it has neither.
      tools: functions that the assistant may call, as JSON schemas.
      arguments: template arguments, such as ``{"enable_thinking": False}``.
      extra: unknown keys of turns, which a template may use.
    """

    turns: list[dict[str, Any]]
    marks: list[bool | None]
    tools: list[Any] | None = None
    arguments: Mapping[str, Any] = {}
    extra: frozenset[str] = frozenset()


def check_text(value: Any, name: str, place: str) -> str:
    """Returns `value` if it is a string that can be tokenized; otherwise raises."""
    if not isinstance(value, str):
        raise JaxtuneError(f"{place}: {name} must be a string, not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # Readers of text files decode invalid bytes to surrogates in this range.
        raw = "\udc80" <= value[error.start] <= "\udcff"
        what = "is not UTF-8" if raw else "contains an unpaired surrogate"
        raise JaxtuneError(f"{place}: {name} {what}") from error
    return value


def check_messages(messages: Any, place: str) -> list[dict[str, Any]]:
    """Returns the turns of a conversation after checking it; see `read_conversation`."""
    return read_conversation(messages, place).turns


def read_conversation(
    messages: Any, place: str, tools: Any = None, arguments: Any = None
) -> Conversation:
    """Checks a conversation in the format of OpenAI and Hugging Face.

    Args:
      messages: objects with role and content, or their JSON text. Assistant turns may have
        tool_calls and reasoning (`REASONING_KEYS`); any turn may have ``train`` (true or false) or
        ``weight`` (0 or 1).
      place: location of the conversation, for errors.
      tools: JSON schemas of functions, their JSON text, or None.
      arguments: template arguments as an object, its JSON text, or None.

    Raises:
      JaxtuneError: a key is missing, or a value has the wrong type.
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
        raise JaxtuneError(f"{place}: tools must be a list of JSON schemas of functions")
    return Conversation(
        turns, marks, tools or None, read_arguments(arguments, place), frozenset(extra)
    )


def read_arguments(value: Any, place: str, name: str = "chat_template_kwargs") -> dict[str, Any]:
    """Returns template arguments from an object or its JSON text, after checking them."""
    arguments = parse_json_text(value, f"{place}: {name}") if value else {}
    if not isinstance(arguments, Mapping):
        raise JaxtuneError(f"{place}: {name} must be a JSON object")
    if taken := sorted(set(arguments) & _OWN_ARGUMENTS):
        raise JaxtuneError(f"{place}: {name} must not set {taken[0]}, which jaxtune sets")
    # In a table of `datasets`, a key that a row lacks has the value None.
    return {key: given for key, given in arguments.items() if given is not None}


def tool_name(tool: Any) -> str:
    """Returns the function name in a JSON schema, or an empty string."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else ""


def _read_turn(given: Message, name: str, place: str) -> tuple[dict[str, Any], set[str]]:
    """Returns a checked turn and the set of its unknown keys."""
    role = given.get("role")
    calls = role == "assistant" and bool(given.get("tool_calls"))
    # Reasoning without content is equivalent to content with only a think block.
    reasons = role == "assistant" and any(str(given.get(key, "")).strip() for key in REASONING_KEYS)
    for key in ("role",) if calls or reasons else ("role", "content"):
        if key not in given:
            hint = "; convert function_call to tool_calls" if "function_call" in given else ""
            raise JaxtuneError(f'{place}: {name} has no key "{key}"{hint}')
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
                f'{place}: {name} has an unknown key "{key}"; did you mean "{meant}"? (known for '
                f"this role: {', '.join(known)})"
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
    """Returns the known key that `key` is a misspelling of, or an empty string."""
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
            f"{place}: {name}.content must be a string, not {kind}; convert the tool result to "
            "JSON text"
        )
    if not parts:
        return check_text(value, f"{name}.content", place)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise JaxtuneError(
                f"{place}: {name}.content[{index}] has type {kind}; only text can be trained on"
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
    """Returns checked calls; arguments keep their form, an object or JSON text."""
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
            raise JaxtuneError(f"{place}: {where}.arguments: invalid JSON")
        if not isinstance(parse_json_text(arguments, f"{place}: {where}.arguments"), Mapping):
            raise JaxtuneError(f"{place}: {where}.arguments must be a JSON object")
        called = check_text(function["name"], f"{where}.name", place)
        entry = {"type": "function", "function": {"name": called, "arguments": arguments}}
        found.append(({"id": call["id"]} if call.get("id") else {}) | entry)
    return found


def read_function_calls(value: Any, place: str) -> Any:
    """Parses the JSON text of a ShareGPT function_call: one call, or a list of calls.

    Arguments are returned as JSON text, so that their numbers keep their spelling.
    """
    if not isinstance(value, str):
        return value if isinstance(value, list) else [value]
    parsed = parse_json_text(value, f"{place}: function call")
    if isinstance(parsed, str):
        raise JaxtuneError(f"{place}: function call: invalid JSON")
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
        raise JaxtuneError(
            f"{place}: {name} may have either train (true or false) or weight (0 or 1)"
        )
    if role != "assistant" and marks[0]:
        raise JaxtuneError(
            f"{place}: {name} is a {role} turn; only assistant turns can be trained on"
        )
    return bool(marks[0])


def choose_targets(conversation: Conversation, targets: str, place: str) -> list[int]:
    """Returns the indices of the turns to train on.

    An assistant turn at the start of a conversation is excluded, because it has no prompt.

    Args:
      conversation: conversation with marks.
      targets: ``all`` (assistant turns not marked false), ``last`` (the last assistant turn, if it
        is not marked false) or ``marked`` (turns marked true).
      place: location of the conversation, for errors.

    Raises:
      JaxtuneError: there is no turn to train on, or the first turn is marked true.
    """
    roles = [turn["role"] for turn in conversation.turns]
    chosen = [index for index, role in enumerate(roles) if role == "assistant"]
    if not chosen:
        raise JaxtuneError(f"{place}: no assistant turn, nothing to train on")
    if targets == "last":
        chosen = chosen[-1:]
    unmarked = targets != "marked"
    marks = conversation.marks
    learned = [i for i in chosen if marks[i] or (marks[i] is None and unmarked)]
    if 0 in learned and (marks[0] or learned == [0]):
        raise JaxtuneError(
            f"{place}: messages[0] is an assistant turn without a prompt and cannot be trained on; "
            'add a user turn before it, or mark it "train": false and train on a later turn'
        )
    learned = [index for index in learned if index]
    if not learned:
        raise JaxtuneError(
            f"{place}: train and weight leave no turn to train on with data.targets={targets}"
        )
    return learned


def canonical_content(conversation: Conversation) -> bytes:
    """Returns the content of a conversation as bytes, equal for equivalent conversations.

    Reasoning is moved to the start of the content, arguments of calls are parsed, and unknown keys
    are dropped, so that duplicates are recognized in any form.
    """
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
    """Returns a called function with its arguments as an object."""
    return {**function, "arguments": parse_json_text(function["arguments"], "arguments")}
