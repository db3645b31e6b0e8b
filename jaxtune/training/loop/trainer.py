"""The training loop: step, log, evaluate, save, and resume after an interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxtune.atomic_files import report_full_disk
from jaxtune.config import Config
from jaxtune.parallel.processes import listen_for_notices
from jaxtune.runs.checkpoints import EXTRA, Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import MetricLog
from jaxtune.strict_json import entry
from jaxtune.training.durations import Timeline
from jaxtune.training.loop.actions import Actions
from jaxtune.training.loop.callbacks import Callback, Callbacks
from jaxtune.training.loop.early_stopping import (
    StopSettings,
    Tally,
    adapt,
    read_counters,
    stop_settings,
)
from jaxtune.training.loop.preemption import watchdog
from jaxtune.training.loop.profile import Profile
from jaxtune.training.loop.recorder import Display, Recorder

logger = logging.getLogger(__name__)


class Loader(Protocol):
    """An endless iterator over batches whose position can be saved and restored."""

    def __next__(self) -> Any:
        """Returns the next batch, a pytree of NumPy arrays."""

    @property
    def rows(self) -> int:
        """Number of data rows in all batches so far."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Restores a position returned by `state`."""

    def move_to(self, steps: int) -> None:
        """Moves to the position after a number of batches."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The parts of a training run, and the loop over its steps.

    Attributes:
      step: ``(state, batch) -> (state, metrics)``, jitted; may donate the state. Metrics are
        scalars and include ``loss``, ``grad_norm``, ``learning_rate`` and ``tokens`` (of the
        batch), and ``skipped`` if steps can be skipped.
      loader: source of the batches.
      evaluate: ``trainable -> scores`` on the held-out sets: numbers, among them ``loss``, and
        optionally ``expert_load`` and ``samples``, which have separate files. None: no
        held-out data.
      save_adapter: ``(trainable, directory)``, exports the adapter. None: full fine-tuning, whose
        only copies are checkpoints.
      run: directory of the run, already started.
      config: resolved config of the run.
      steps: number of steps; ``training.steps`` by default.
      timeline: progress through the data, for intervals in epochs or tokens.
      callbacks: callbacks of the user.
      begin: changes the initial state of a run without a checkpoint; may donate it.
      moved: the last step at which the order of the data was changed; from checkpoints up to it,
        the loader is moved to the same number of steps of the new order.
    """

    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]
    loader: Loader
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    save_adapter: Callable[[Any, Path], Any] | None
    run: RunDirectory
    config: Config
    steps: int | None = None
    timeline: Timeline | None = None
    callbacks: Sequence[Callback] = ()
    begin: Callable[[Any], Any] | None = None
    moved: int = -1

    def fit(self, state: Any) -> Any:
        """Trains to the end, from the newest undamaged checkpoint of the run if there is one.

        On a deterministic backend, a run that is killed at any moment and resumed has bitwise the
        same losses as an uninterrupted one.

        Args:
          state: initial state of a new run, a pytree of `jax.Array` with an attribute
            ``trainable``. It is donated.

        Returns:
          The state after the last step: step `steps`, or earlier if the run was stopped.

        Raises:
          JaxtuneError: too many skipped steps in a row, a held-out score that is not finite (the
            step is not saved), a full disk, or a checkpoint of other shapes.
          Preempted: SIGTERM or a preemption notice was received; every process has saved the same
            step.
          KeyboardInterrupt: raised again once a save in progress is complete.
        """
        config, run = self.config, self.run
        steps = int(config.training.steps if self.steps is None else self.steps)
        with (
            report_full_disk(run.path),
            Checkpoints(
                run.checkpoints, config.checkpoint.keep, config.checkpoint.timeout_minutes
            ) as checkpoints,
            _log_interrupt(checkpoints, run),
        ):
            stopping = stop_settings(config.evaluation, steps)
            state, tally, resumed = _resume(state, self.loader, checkpoints, stopping, self.moved)
            if self.save_adapter is None:
                checkpoints.pinned = tally.best_step
            if resumed is None and self.begin is not None:
                state = self.begin(state)
            start = resumed or 0
            if resumed is not None and self.save_adapter is not None:
                # The adapter on disk may belong to another step than the restored checkpoint.
                run.replace_directory(run.adapter_last, partial(self.save_adapter, state.trainable))
            with (
                MetricLog(run.path, config.logging.tensorboard, start, config.logging.wandb) as log,
                Display(start, steps) as display,
                Profile(config.profile.steps, run.path / "profile") as profile,
                watchdog(config.training.watchdog_minutes) as dog,
            ):
                callbacks = Callbacks(self.callbacks, run.path, steps)
                recorder = Recorder(log, display, tally, config, steps, self.timeline, callbacks)
                actions = self._actions(checkpoints, log, recorder, tally, stopping, callbacks)
                if steps == 0 and resumed is None:
                    actions.after_step(0, state, last=True)
                number = start
                while number < steps and not tally.stopped:
                    number += 1
                    with recorder.waiting():
                        batch = next(self.loader)
                    profile.before(number)
                    state, metrics = self.step(state, batch)
                    if number == start + 1:
                        # From here on, SIGTERM waits until the step is evaluated and saved.
                        listen_for_notices()
                    profile.after(number, state)
                    recorder.put(number, metrics, batch, self.loader.rows)
                    checkpoints.poll()
                    dog.step()
                    actions.announce()
                    actions.after_step(number, state, last=number == steps)
                    if number < steps and actions.stop_requested(number, state):
                        break
                checkpoints.wait()
                actions.finish(number)
        return state

    def _actions(
        self,
        checkpoints: Checkpoints,
        log: MetricLog,
        recorder: Recorder,
        tally: Tally,
        stopping: StopSettings,
        callbacks: Callbacks,
    ) -> Actions:
        return Actions(
            config=self.config,
            evaluate=self.evaluate,
            save_adapter=self.save_adapter,
            run=self.run,
            loader=self.loader,
            timeline=self.timeline,
            checkpoints=checkpoints,
            log=log,
            recorder=recorder,
            tally=tally,
            stopping=stopping,
            callbacks=callbacks,
        )


def _resume(
    state: Any, loader: Loader, checkpoints: Checkpoints, stopping: StopSettings, moved: int
) -> tuple[Any, Tally, int | None]:
    """Returns the state and tally of the newest checkpoint, and its step; without one, `state`, an
    empty tally and None."""
    latest = checkpoints.latest_verified()
    if latest is None:
        return state, Tally(), None
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # a restore next to it would need the memory of two states
    state, extra = checkpoints.restore(latest, like)
    place = checkpoints.directory / str(latest) / EXTRA
    if latest <= moved:
        loader.move_to(latest)
    else:
        loader.restore(entry(extra, "loader", dict, place))
    logger.info("resuming after step %d, from %s", latest, checkpoints.directory)
    tally, before = read_counters(extra, place)
    if before is not None:
        adapt(tally, before, stopping)
    return state, tally, latest


@contextlib.contextmanager
def _log_interrupt(checkpoints: Checkpoints, run: RunDirectory) -> Iterator[None]:
    """Completes a save in progress after an interrupt, and logs how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoints.wait()
        saved = checkpoints.steps()
        where = f"the checkpoint of step {saved[-1]}" if saved else "the start (no checkpoint yet)"
        logger.warning("interrupted; jaxtune train --workdir %s resumes from %s", run.path, where)
        raise
