"""Which evaluation was the best, and when a run has stopped getting better."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from jaxtune.config import EvaluationConfig
from jaxtune.errors import JaxtuneError, closest

logger = logging.getLogger(__name__)

HIGHER_IS_BETTER = {
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
    "exact_match": True,
    "balance_loss": False,
}
"""Scores that can choose the best adapter; of a named set with its name before, as in a/loss."""


@dataclasses.dataclass
class Tally:
    """What a run has counted so far; every checkpoint holds it.

    Attributes:
      tokens: seen, as the metric of that name counts them.
      skipped: updates that were not made, by reason.
      bad_in_a_row: of these, the last ones without an update that was made between them.
      best: the best score so far.
      best_step: the update that it was measured after.
      stale: evaluations since.
      stopped: whether they were too many.
    """

    tokens: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    bad_in_a_row: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    stopped: bool = False


def check_metric(metric: str, scores: Iterable[str]) -> None:
    """Refuses a score that an evaluation does not give, or that has no better and worse.

    Args:
      metric: ``evaluation.stop_metric``.
      scores: names of what an evaluation gives.

    Raises:
      JaxtuneError: with the closest one.
    """
    usable = [name for name in scores if name.rsplit("/", 1)[-1] in HIGHER_IS_BETTER]
    if metric not in usable:
        hint = " (it needs evaluation.generate)" if metric.endswith("exact_match") else ""
        raise JaxtuneError(
            f'evaluation.stop_metric="{metric}" is not a metric of an evaluation'
            f"{closest(metric, usable)} (known: {', '.join(usable)}){hint}"
        )


def consider(
    tally: Tally, number: int, scores: Mapping[str, Any], settings: EvaluationConfig
) -> bool:
    """Takes note of an evaluation.

    Args:
      tally: is changed.
      number: the update that it follows.
      scores: of the evaluation.
      settings: the ``evaluation`` section.

    Returns:
      Whether it is the best so far.
    """
    metric = settings.stop_metric
    check_metric(metric, scores)
    value, sign = scores[metric], -1 if HIGHER_IS_BETTER[metric.rsplit("/", 1)[-1]] else 1
    change = 0.0 if tally.best is None else sign * (tally.best - value)
    if tally.best is None or (change > 0 and change >= settings.stop_min_change):
        tally.best, tally.best_step, tally.stale = value, number, 0
        return True
    tally.stale += 1
    if settings.stop_patience and tally.stale >= settings.stop_patience:
        tally.stopped = True
        logger.info(
            "stopping after step %d: %d evaluations in a row without a better %s",
            number,
            tally.stale,
            metric,
        )
    return False
