"""Prompts of the Python interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

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
    elements = list(given)  # once: it may be a generator
    alone = any(isinstance(element, (Mapping, int, np.integer)) for element in elements)
    return ([elements] if alone else elements), alone
