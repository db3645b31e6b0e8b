"""Spellings of a conversation: that of the row, and equivalent ones that some templates need.

Templates differ in the input they expect: arguments of calls as text or as an object, reasoning
under a key or in the content. The spelling of the row comes first, because `transformers` renders
it unchanged; others are tried if the template fails on it or omits parts of it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtune.chats.jsontext import parse_exact_numbers
from jaxtune.chats.reasoning import fold_reasoning, separate_reasoning
from jaxtune.strict_json import parse_json

Turn = dict[str, Any]


class Spelling(NamedTuple):
    """Turns as they are passed to a template.

    Attributes:
      turns: turns of the conversation.
      numbers: original numbers by placeholder, for `restore_numbers`.
    """

    turns: list[Turn]
    numbers: dict[str, str]

    def shows(self, rendered: str) -> bool:
        """Returns whether a rendering contains the arguments of all calls, as spelled here.

        Args:
          rendered: the conversation as text, before `restore_numbers`.
        """
        for function in _called_functions(self.turns):
            arguments = function["arguments"]
            if isinstance(arguments, str):
                # A template that expects objects prints text as a quoted JSON string.
                quoted = json.dumps(arguments, ensure_ascii=False)
                if arguments not in rendered or quoted in rendered:
                    return False
        return all(placeholder in rendered for placeholder in self.numbers)


def spellings(turns: Sequence[Turn]) -> Iterator[Spelling]:
    """Yields the spellings of a conversation, starting with that of the row.

    They are the product of up to two forms of reasoning (as given, folded into the content), two of
    a missing content (None, empty) and three of the arguments of calls (as given, as objects with
    exact or plain numbers, as text). Forms that would not differ from the given one are left out.
    """
    reasoning: list[Callable[[Turn], Turn]] = [lambda turn: turn]
    content: list[Callable[[Turn], Turn]] = [lambda turn: turn]
    arguments: list[Callable[[Sequence[Turn]], Spelling]] = [lambda given: Spelling([*given], {})]
    if any(separate_reasoning(turn).strip() for turn in turns):
        reasoning.append(fold_reasoning)
    functions = list(_called_functions(turns))
    if any(isinstance(function["arguments"], str) for function in functions):
        arguments += [_with_objects, lambda given: _with_objects(given, exact=False)]
    if any(not isinstance(function["arguments"], str) for function in functions):
        arguments.append(_with_texts)
    if any(turn.get("content") is None for turn in turns):
        content.append(lambda turn: {**turn, "content": turn.get("content") or ""})
    for spell_reasoning, fill, spell_arguments in itertools.product(reasoning, content, arguments):
        yield spell_arguments([fill(spell_reasoning(turn)) for turn in turns])


def remove_whitespace(text: str) -> str:
    """Returns text without whitespace, which templates add and strip."""
    return "".join(text.split())


def _called_functions(turns: Sequence[Turn]) -> Iterator[dict[str, Any]]:
    return (call["function"] for turn in turns for call in turn.get("tool_calls") or ())


def _with_arguments(
    turns: Sequence[Turn], spell: Callable[[Any], Any], numbers: dict[str, str]
) -> Spelling:
    spelled = []
    for turn in turns:
        if calls := turn.get("tool_calls"):
            functions = [
                {**call["function"], "arguments": spell(call["function"]["arguments"])}
                for call in calls
            ]
            pairs = zip(calls, functions, strict=True)
            turn = {**turn, "tool_calls": [{**call, "function": made} for call, made in pairs]}
        spelled.append(turn)
    return Spelling(spelled, numbers)


def _with_texts(turns: Sequence[Turn]) -> Spelling:
    def text(arguments: Any) -> str:
        if isinstance(arguments, str):
            return arguments
        return json.dumps(arguments, ensure_ascii=False)

    return _with_arguments(turns, text, {})


def _with_objects(turns: Sequence[Turn], exact: bool = True) -> Spelling:
    numbers: dict[str, str] = {}
    taken = json.dumps([*turns], ensure_ascii=False, default=str)

    def read(arguments: Any) -> Any:
        if not isinstance(arguments, str):
            return arguments
        if exact:
            return parse_exact_numbers(arguments, taken, numbers)
        return parse_json(arguments.encode(), "arguments")

    return _with_arguments(turns, read, numbers)
