"""Callbacks: code of the user that runs between the steps of a run and may stop it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.errors import JaxtuneError, closest, shown


@dataclasses.dataclass(frozen=True)
class Event:
    """What has happened in a run.

    Attributes:
      step: number of the step, from 1.
      steps: planned number of steps.
      metrics: `on_step`: the step's metrics, as in ``metrics.jsonl``, and ``skipped`` with the
        reason if the step was skipped; `on_evaluation`: the scores; `on_end`: the metrics of the
        last step. Empty otherwise.
      run: directory of the run.
      best: `on_evaluation`: whether the scores are the best so far.
      checkpoint: `on_checkpoint`: directory of the checkpoint.
    """

    step: int
    steps: int
    metrics: Mapping[str, Any]
    run: Path
    best: bool = False
    checkpoint: Path | None = None
    _stop: Callable[[], None] = dataclasses.field(default=lambda: None, repr=False, compare=False)

    def stop(self) -> None:
        """Ends the run after the step in progress, with a checkpoint; it can be resumed."""
        self._stop()


class Callback:
    """Base class of callbacks; a subclass overrides the methods that it needs.

    The methods run in the process that trains, on a resume as on a first start. An exception ends
    the run; what has been saved is kept. In several processes every process calls them, with the
    same events and without collective operations in them; process 0 decides about stopping.
    """

    def on_step(self, event: Event) -> None:
        """Runs when the metrics of a step are known.

        Metrics are read one step late, while the next step is already running, so that the device
        does not wait.
        """

    def on_evaluation(self, event: Event) -> None:
        """Runs after an evaluation."""

    def on_checkpoint(self, event: Event) -> None:
        """Runs when a checkpoint is complete, a few steps after its own step.

        In processes other than process 0, only the arrays are written then, not yet the manifest.
        """

    def on_end(self, event: Event) -> None:
        """Runs once at the end: after the last step, early stopping, or a stop by a callback."""


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raises if it is not a sequence of instances of `Callback`."""
    if not isinstance(callbacks, Sequence):
        raise JaxtuneError(f"callbacks takes a list of callbacks, not {shown(callbacks)}")
    for index, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise JaxtuneError(
                f"callbacks[{index}] is {shown(callback)}, not an instance of jaxtune.Callback"
            )
        for name in dir(callback):
            method = getattr(callback, name)
            if not name.startswith("on_"):
                continue
            if name not in vars(Callback):
                known = [event for event in vars(Callback) if event.startswith("on_")]
                raise JaxtuneError(
                    f"callbacks[{index}]: {type(callback).__name__}.{name} is not an event"
                    f"{closest(name, known)} (known: {', '.join(known)})"
                )
            try:
                inspect.signature(method).bind(None)
            except (TypeError, ValueError):
                raise JaxtuneError(
                    f"callbacks[{index}]: {type(callback).__name__}.{name} takes one argument, the "
                    "event"
                ) from None


class Callbacks:
    """The callbacks of a run, and whether one of them has asked to stop.

    Attributes:
      stopping: whether a callback has called `Event.stop`.
    """

    def __init__(self, callbacks: Sequence[Callback], run: Path, steps: int):
        """Stores the callbacks.

        Args:
          callbacks: called in this order.
          run: directory of the run.
          steps: planned number of steps.
        """
        self._callbacks, self._run, self._steps = tuple(callbacks), run, steps
        self._last: Mapping[str, Any] = {}
        self.stopping = False

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Calls `Callback.on_step`; `metrics` are numbers by name."""
        self._last = dict(metrics)
        for callback in self._callbacks:
            callback.on_step(self._event(step, metrics))

    def on_evaluation(self, step: int, scores: Mapping[str, Any], best: bool) -> None:
        """Calls `Callback.on_evaluation`."""
        for callback in self._callbacks:
            callback.on_evaluation(self._event(step, scores, best=best))

    def on_checkpoint(self, step: int, checkpoint: Path) -> None:
        """Calls `Callback.on_checkpoint`."""
        for callback in self._callbacks:
            callback.on_checkpoint(self._event(step, {}, checkpoint=checkpoint))

    def on_end(self, step: int) -> None:
        """Calls `Callback.on_end`."""
        for callback in self._callbacks:
            callback.on_end(self._event(step, self._last))

    def _event(self, step: int, metrics: Mapping[str, Any], **values: Any) -> Event:
        return Event(step, self._steps, dict(metrics), self._run, _stop=self._stop, **values)

    def _stop(self) -> None:
        self.stopping = True
