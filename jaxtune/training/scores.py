"""Scores of an evaluation: their order, and the functions that rate generated answers."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from jaxtune.errors import JaxtuneError

Rate = Callable[[str, str], float]


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of an evaluation.

    Attributes:
      higher_is_better: whether a higher value is better.
      rate: ``(answer, expected) -> value`` of a generated answer; None for scores of the loss.
    """

    higher_is_better: bool
    rate: Rate | None = None


SCORES: dict[str, Score] = {
    "loss": Score(False),
    "perplexity": Score(False),
    "token_accuracy": Score(True),
    "balance_loss": Score(False),
    "exact_match": Score(True, lambda answer, expected: float(answer == expected)),
}
"""Scores that can select the best step, by name.

Scores of a named held-out set have its name as a prefix, as in ``law/loss``.
"""

_BUILT_IN = frozenset(SCORES)
_RESERVED = {"step", "set", "prompt", "expected", "answer", "tokens", "expert_load", "samples"}
_RESERVED |= {"expert_load_max", "expert_load_min", "experts_unused"}  # of `load_summary`


def register_score(name: str, rate: Rate, *, higher_is_better: bool = True) -> None:
    """Registers a score of generated answers, which `evaluation.generate` then reports.

    It can select the best step, with ``evaluation.stop_metric=NAME``. Registering a name again
    replaces the function. In several processes, every process registers the same scores.

    Args:
      name: name of the score: letters, digits and underscores.
      rate: ``(answer, expected) -> value``, a finite number, on stripped text; the score of a set
        is the mean over its answers.
      higher_is_better: whether a higher value is better.

    Raises:
      JaxtuneError: the name is not valid or belongs to a built-in score.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
        raise JaxtuneError(f"{name!r} is not a name of a score: use letters, digits and _")
    if name in _BUILT_IN or name in _RESERVED:
        raise JaxtuneError(f'"{name}" is a built-in name; choose another name for the score')
    if not callable(rate):
        raise JaxtuneError(f'the score "{name}" takes a function of (answer, expected), not {rate}')
    SCORES[name] = Score(higher_is_better, rate)


def answer_scores() -> list[str]:
    """Returns the names of the scores of generated answers."""
    return [name for name, score in SCORES.items() if score.rate is not None]


def rate_answer(answer: str, expected: str) -> dict[str, float]:
    """Returns the scores of an answer by name.

    Raises:
      JaxtuneError: a registered function returns something other than a finite number.
    """
    values = {}
    for name, score in SCORES.items():
        if score.rate is None:
            continue
        try:
            value = score.rate(answer, expected)
        except Exception as error:
            raise JaxtuneError(
                f'the score "{name}" failed for an answer: {type(error).__name__}: {error}'
            ) from error
        values[name] = _number(value)
        if not math.isfinite(values[name]):
            raise JaxtuneError(f'the score "{name}" is {value!r} for an answer, not a number')
    return values


def _number(value: Any) -> float:
    """Returns a number, such as a NumPy scalar, as a float; NaN for anything else."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def has_order(score: str) -> bool:
    """Returns whether a score, possibly of a named set, can select the best step."""
    return _last(score) in SCORES


def higher_is_better(score: str) -> bool:
    """Returns whether a higher value of a score, possibly of a named set, is better."""
    return SCORES[_last(score)].higher_is_better


def _last(score: str) -> str:
    return score.rsplit("/", 1)[-1]
