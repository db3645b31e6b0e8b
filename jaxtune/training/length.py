"""The length of a run that is resumed: longer or shorter than planned, and its learning rate."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from jaxtune.config import Config
from jaxtune.config.length import length_unit
from jaxtune.errors import JaxtuneError
from jaxtune.runs.changes import first_training
from jaxtune.runs.directory import RunDirectory
from jaxtune.training.durations import Timeline
from jaxtune.training.optimizer import count_steps, make_schedule
from jaxtune.training.setup import Setup

logger = logging.getLogger(__name__)


def check_length(run: RunDirectory, config: Config, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises if a new length in steps is below the finished ones; others are checked later.

    Args:
      run: directory of the run.
      config: config of the run.
      changes: changes of the config since the run was last started.

    Raises:
      JaxtuneError: the run has done more steps.
    """
    done, steps = run.steps_done(), config.training.steps
    if length_unit(config.training) == "steps" and "training.steps" in changes and steps < done:
        raise _too_short("training.steps", steps, done)


def _too_short(key: str, value: Any, done: int, steps: int | None = None) -> JaxtuneError:
    counted = "" if steps is None else f", and this is {steps}"
    return JaxtuneError(
        f"{key}={value}: the run has done {done} steps already{counted}; give at least as many"
    )


def with_length(
    setup: Setup, run: RunDirectory, timeline: Timeline, changes: Mapping[str, tuple[Any, Any]]
) -> Setup:
    """Returns a setup whose learning-rate schedule spans the length of the run.

    The schedule of a run with a new length is that of a run which had this length from the start,
    except that a warm-up given as a share keeps its number of steps. Logs how the learning rate
    changes.

    Args:
      setup: setup of the run.
      run: directory of the run.
      timeline: progress through the training data.
      changes: changes of the config since the run was last started; see `RunDirectory.changes`.

    Raises:
      JaxtuneError: the run has done more steps than its new length.
    """
    training, optimizer = setup.config.training, setup.config.optimizer
    unit, done = length_unit(training), run.steps_done()
    steps = timeline.total_steps(training)
    key = f"training.{unit}"
    if key in changes and steps < done:
        raise _too_short(key, getattr(training, unit), done, steps)
    first = timeline.total_steps(first_training(run.read_history(), run.read_config()))
    warmup = None
    if first != steps and isinstance(optimizer.warmup_steps, float):
        warmup = count_steps(optimizer.warmup_steps, first)
        optimizer = dataclasses.replace(optimizer, warmup_steps=warmup)
    setup = setup.with_total_steps(steps, warmup)
    if key in changes:
        planned = setup.config.replace(training={unit: changes[key][0]}).training
        before = timeline.total_steps(planned)
        old = _rate(make_schedule(optimizer, before, provisional=True), done)
        _log_rates(setup, before, done, old)
    return setup


def _rate(schedule: optax.Schedule, index: int) -> float:
    return float(np.asarray(schedule(index)))


def _log_rates(setup: Setup, before: int, done: int, old: float) -> None:
    """Logs the new length, and the learning rate of the next step before and after the change."""
    steps, new = setup.steps, f"{_rate(setup.schedule, done):.3g}"
    what = "lengthened" if steps > before else "shortened"
    rate = f"stays {new}" if new == f"{old:.3g}" else f"is {new} instead of {old:.3g}"
    logger.info(
        "%s from %d to %d steps; optimizer.schedule=%s now spans %d steps: the learning rate of "
        "step %d %s",
        what,
        before,
        steps,
        setup.config.optimizer.schedule,
        steps,
        done + 1,
        rate,
    )
