"""The reasoning of a turn, under a separate key or between think tags in the content.

Content has reasoning if it begins with ``<think>`` or if the prompt ends with that tag. The
reasoning ends at the last ``</think>`` that is not quoted by backticks. Other think tags are part
of the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

THINK, END_THINK = "<think>", "</think>"
# In the order of precedence in `transformers`.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

_END = re.compile(r"(?<!`)</think>|</think>(?!`)")
_EMPTY = re.compile(r"\s*(?:<think>)?\s*</think>\s*")
_OPENING = re.compile(r"<think>\s*(?:</think>\s*)?$")


def separate_reasoning(turn: Mapping[str, Any]) -> str:
    """Returns the reasoning under a separate key; empty if there is none."""
    return next((turn[key] for key in REASONING_KEYS if turn.get(key)), "")


def split_content(content: str, opened: bool) -> tuple[str, str]:
    """Splits content into reasoning and answer.

    Args:
      content: content of an assistant turn.
      opened: whether the prompt ends with ``<think>``.

    Returns:
      The reasoning without tags, empty if there is none, and the answer.
    """
    begins = content.lstrip().startswith(THINK)
    ends = list(_END.finditer(content)) if begins or opened else []
    if not ends:
        return "", content
    reasoning = content[: ends[-1].start()].strip().removeprefix(THINK)
    return reasoning.strip(), content[ends[-1].end() :].lstrip("\r\n")


def ends_reasoning(content: str) -> bool:
    """Returns whether content has a ``</think>`` that is not quoted."""
    return _END.search(content) is not None


def ends_with_think(prompt: str) -> bool:
    """Returns whether a prompt ends with an open ``<think>``."""
    return prompt.rstrip().endswith(THINK)


def strip_think(prompt: str) -> str:
    """Returns a prompt without the think tags at its end."""
    return _OPENING.sub("", prompt)


def empty_block_length(written: str) -> int:
    """Returns the length of an empty think block at the start of a turn; 0 if there is none."""
    match = _EMPTY.match(written)
    return match.end() if match else 0


def fold_reasoning(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a turn with its reasoning in the content, in the format of R1 and Qwen3."""
    reasoning = separate_reasoning(turn)
    rest = {key: value for key, value in turn.items() if key not in REASONING_KEYS}
    if reasoning.strip():
        content = turn.get("content") or ""
        rest["content"] = f"{THINK}\n{reasoning.strip()}\n{END_THINK}\n\n{content}"
    return rest
