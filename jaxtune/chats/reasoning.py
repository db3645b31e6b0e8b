"""The reasoning of a turn: beside its content, or in it between the think tags.

Content holds reasoning if it begins with ``<think>``, or if the prompt ends with that tag, and it
goes up to the last ``</think>`` that is not quoted as code. Any other content that names the tags
is an answer about them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

THINK, END_THINK = "<think>", "</think>"
# In the order in which `transformers` takes them.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

_END = re.compile(r"(?<!`)</think>|</think>(?!`)")
_EMPTY = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?$")


def separate_reasoning(turn: Mapping[str, Any]) -> str:
    """Returns the reasoning that a turn has beside its content; empty where it has none."""
    return next((turn[key] for key in REASONING_KEYS if turn.get(key)), "")


def split_content(content: str, opened: bool) -> tuple[str, str]:
    """Returns the reasoning that stands in a content, and the answer after it.

    Args:
      content: of an assistant's turn.
      opened: whether the prompt ends with ``<think>``.
    """
    begins = content.lstrip().startswith(THINK)
    ends = list(_END.finditer(content)) if begins or opened else []
    if not ends:
        return "", content
    reasoning = content[: ends[-1].start()].strip().removeprefix(THINK)
    return reasoning.strip(), content[ends[-1].end() :].lstrip("\r\n")


def ends_with_think(prompt: str) -> bool:
    """Returns whether a prompt ends with an open ``<think>``."""
    return prompt.rstrip().endswith(THINK)


def strip_think(prompt: str) -> str:
    """Returns a prompt without the think tags that it ends with."""
    return _OPENING.sub("", prompt)


def empty_block_length(written: str) -> int:
    """Returns the length of the empty think block that a turn begins with; 0 if it has none."""
    match = _EMPTY.match(written)
    return match.end() if match else 0


def fold_reasoning(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a turn with its reasoning in its content, in the form of R1 and Qwen3."""
    reasoning = separate_reasoning(turn)
    rest = {key: value for key, value in turn.items() if key not in REASONING_KEYS}
    if reasoning.strip():
        content = turn.get("content") or ""
        rest["content"] = f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{content}"
    return rest
