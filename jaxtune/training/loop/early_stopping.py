"""The best evaluation of a run, and early stopping."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import EvaluationConfig
from jaxtune.errors import JaxtuneError, closest
from jaxtune.strict_json import entry, expect
from jaxtune.training.scores import answer_scores, has_order, higher_is_better

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Tally:
    """Counters of a run, stored in every checkpoint.

    Attributes:
      tokens: tokens seen, as in the metric of that name.
      skipped: number of skipped steps by reason.
      bad_in_a_row: number of steps skipped since the last applied one, except float16 overflows.
      best: best score so far.
      best_step: step of the best score.
      stale: number of evaluations since the best score.
      stopped: whether early stopping ends the run.
    """

    tokens: int = 0
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    bad_in_a_row: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    stopped: bool = False


class StopSettings(NamedTuple):
    """Settings under which a run selects its best step and may stop early.

    Attributes:
      metric: ``evaluation.stop_metric``.
      patience: ``evaluation.stop_patience``.
      min_change: ``evaluation.stop_min_change``.
      steps: number of steps of the run.
    """

    metric: str
    patience: int
    min_change: float
    steps: int


def read_counters(extra: Mapping[str, Any], place: Path) -> tuple[Tally, StopSettings | None]:
    """Returns the counters in a checkpoint, and the settings of early stopping at that time.

    Args:
      extra: content of the file; checkpoints of earlier versions lack the settings.
      place: the file, for errors.

    Raises:
      JaxtuneError: an entry is missing or has another type.
    """
    counters = dict(entry(extra, "tally", dict, place))
    kinds = {"tokens": int, "bad_in_a_row": int, "stale": int, "stopped": bool, "skipped": dict}
    for name, kind in kinds.items():
        entry(counters, name, kind, place)
    for count in counters["skipped"].values():
        expect(count, int, f'{place}: "skipped"')
    for name, kind in (("best", float), ("best_step", int)):
        if counters.get(name) is not None:
            entry(counters, name, kind, place)
    if unknown := counters.keys() - {field.name for field in dataclasses.fields(Tally)}:
        raise JaxtuneError(f'{place}: "tally" has the unknown key "{min(unknown)}"')
    if "stopping" not in extra:
        return Tally(**counters), None
    before = entry(extra, "stopping", dict, place)
    metric = entry(before, "metric", str, place)
    patience, steps = (entry(before, name, int, place) for name in ("patience", "steps"))
    change = entry(before, "min_change", float, place)
    return Tally(**counters), StopSettings(metric, patience, change, steps)


def stop_settings(section: EvaluationConfig, steps: int) -> StopSettings:
    """Returns the settings of an ``evaluation`` section for a run of `steps` steps."""
    return StopSettings(section.stop_metric, section.stop_patience, section.stop_min_change, steps)


def adapt(tally: Tally, before: StopSettings, now: StopSettings) -> None:
    """Adapts the counters of a resumed run to changed settings.

    Another metric starts without a best score. A run that has stopped early continues if its length
    or a setting of early stopping has changed; its evaluations without a better score are then
    counted anew.

    Args:
      tally: counters of the run, updated in place.
      before: settings at the time of the checkpoint.
      now: settings of the resumed run.
    """
    if before == now:
        return
    if before.metric != now.metric and tally.best is not None:
        logger.info(
            "evaluation.stop_metric: %s → %s: the best step is selected anew, from the next "
            "evaluation on",
            before.metric,
            now.metric,
        )
        tally.best, tally.best_step, tally.stale = None, None, 0
    if tally.stopped:
        logger.info("the run had stopped early; it continues because its settings have changed")
        tally.stopped, tally.stale = False, 0


def check_metric(metric: str, scores: Iterable[str]) -> None:
    """Raises if a score cannot select the best adapter.

    Args:
      metric: ``evaluation.stop_metric``.
      scores: names of the scores of an evaluation.

    Raises:
      JaxtuneError: the evaluation has no such score, or the score has no order; the message names
        the closest valid one.
    """
    usable = [name for name in scores if has_order(name)]
    if metric not in usable:
        of_answers = metric.rsplit("/", 1)[-1] in answer_scores()
        hint = " (it needs evaluation.generate)" if of_answers else ""
        if not closest(metric, usable) and not has_order(metric):
            hint = " (jaxtune.register_score, in the config file for instance, adds others)"
        raise JaxtuneError(
            f'evaluation.stop_metric="{metric}" is not a metric of an evaluation'
            f"{closest(metric, usable)} (known: {', '.join(usable)}){hint}"
        )


def consider(
    tally: Tally, number: int, scores: Mapping[str, Any], settings: EvaluationConfig
) -> bool:
    """Updates the best score, and requests early stopping, after an evaluation.

    Args:
      tally: counters of the run, updated in place.
      number: step of the evaluation.
      scores: scores of the evaluation.
      settings: the ``evaluation`` section.

    Returns:
      Whether the evaluation is the best so far.
    """
    metric = settings.stop_metric
    check_metric(metric, scores)
    value, sign = scores[metric], -1 if higher_is_better(metric) else 1
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
