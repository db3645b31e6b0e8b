"""Prompts of the Python interface."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from jaxtune.errors import check_argument

_logger = logging.getLogger(__name__)

# A prompt: text, token ids or chat messages.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class TextOptions(TypedDict, total=False):
    """Options of `jaxtune.Model.generate` that do not change the type of its result."""

    top_k: int
    top_p: float
    seed: int
    stop: str | Sequence[str]
    skip_special_tokens: bool


def as_prompts(given: Any) -> tuple[list[Any], bool]:
    """Returns (a list of prompts, whether a single prompt was given instead of a list)."""
    if isinstance(given, (str, Mapping)):
        return [given], True
    check_argument("prompts", given, Iterable, "a prompt or a list of prompts")
    elements = list(given)  # once: it may be a generator
    alone = any(isinstance(element, (Mapping, int, np.integer)) for element in elements)
    return ([elements] if alone else elements), alone


def warn_of_length(
    positions: int | None, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]
) -> None:
    """Logs a warning if an answer may exceed the positions that a model was made for.

    Args:
      positions: ``max_position_embeddings`` of the model, if its config has it.
      prompts: token ids of the prompts.
      max_new_tokens: maximum number of new tokens, of all prompts or of each.
    """
    lengths = np.array([len(prompt) for prompt in prompts]) + np.array(max_new_tokens)
    if positions is not None and lengths.size and lengths.max() > positions:
        _logger.warning(
            "%d tokens (prompt and max_new_tokens) exceed the model's max_position_embeddings=%d",
            lengths.max(),
            positions,
        )
