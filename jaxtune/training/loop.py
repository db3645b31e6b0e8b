"""The training loop: step, log, evaluate, save, and resume after an interruption."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax

from jaxtune.atomic_files import report_full_disk
from jaxtune.config import Config
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import MetricLog
from jaxtune.training.callbacks import Milestones
from jaxtune.training.durations import Due, Timeline
from jaxtune.training.early_stopping import Tally
from jaxtune.training.preemption import watchdog
from jaxtune.training.profile import Profile
from jaxtune.training.recorder import Display, Recorder

logger = logging.getLogger(__name__)


class Loader(Protocol):
    """An endless iterator over batches that can say where it is and go back there."""

    def __next__(self) -> Any:
        """Returns the next batch, a pytree of NumPy arrays."""

    @property
    def rows(self) -> int:
        """Rows of the data in all batches so far."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON can hold it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` has returned."""


def fit(
    *,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    loader: Loader,
    evaluate: Callable[[Any], Mapping[str, Any]] | None,
    save_adapter: Callable[[Any, Path], Any] | None,
    run: RunDirectory,
    config: Config,
    steps: int | None = None,
    timeline: Timeline | None = None,
) -> Any:
    """Trains to the end, from the run's newest undamaged checkpoint if it has one.

    On a deterministic backend, a run that was killed at any moment resumes to bitwise the same
    losses as an uninterrupted one.

    Args:
      state: the state of a new run, a pytree of `jax.Array` with an attribute ``trainable``. It
        is consumed: use what is returned.
      step: ``(state, batch) -> (state, metrics)``, jitted, may donate the state; metrics are
        scalars, with ``loss``, ``grad_norm``, ``learning_rate`` and ``tokens`` (of the batch)
        among them, and ``skipped``, why the update was not made, if such a thing can be.
      loader: gives the batches.
      evaluate: ``trainable -> scores`` on what is held out, ``loss`` among them; numbers, but for
        ``expert_load`` and ``samples``, which are written to files of their own. None: no set.
      save_adapter: writes the trainables to a directory; None: the checkpoints hold all there is.
      run: the run's directory, started.
      config: the run's resolved config.
      steps: updates of the run; ``training.steps`` by default.
      timeline: of the data, where the config counts in epochs or tokens.

    Returns:
      The state after the last update: of number `steps`, or earlier where evaluations stopped it.

    Raises:
      JaxtuneError: too many updates in a row whose numbers are not finite, or a score that is not
        (nothing of it is saved), no space left on the disk, or a checkpoint that does not fit.
      Preempted: SIGTERM, or a notice of the machine's; every process has saved the same step.
      KeyboardInterrupt: passed on after the save in progress, if any, is complete.
    """
    steps = int(config.training.steps if steps is None else steps)
    with (
        report_full_disk(run.path),
        Checkpoints(run.checkpoints, config.checkpoint.keep) as checkpoints,
        _explained_interrupt(checkpoints, run),
    ):
        state, tally, resumed = _resume(state, loader, checkpoints)
        start = resumed or 0
        if resumed is not None and save_adapter is not None:
            # The adapter on disk may be of another step than the checkpoint that was restored.
            run.replace_directory(run.adapter_last, partial(save_adapter, state.trainable))
        with (
            MetricLog(run.path, config.logging.tensorboard, start, config.logging.wandb) as log,
            Display(start, steps) as display,
            Profile(config.profile.steps, run.path / "profile") as profile,
            watchdog(config.training.watchdog_minutes) as dog,
        ):
            recorder = Recorder(
                log,
                display,
                tally,
                Due("logging.every", config.logging.every, timeline),
                config.training.max_bad_steps,
                steps,
            )
            milestones = Milestones(
                config,
                evaluate,
                save_adapter,
                run,
                checkpoints,
                loader,
                log,
                recorder,
                tally,
                timeline,
            )
            if steps == 0 and resumed is None:
                milestones.reach(0, state, last=True)
            for number in range(start + 1, steps + 1):
                if tally.stopped:
                    break
                with recorder.waiting():
                    batch = next(loader)
                profile.before(number)
                state, metrics = step(state, batch)
                profile.after(number, state)
                recorder.put(number, metrics, batch, loader.rows)
                checkpoints.poll()
                dog.step()
                milestones.reach(number, state, last=number == steps)
                if number < steps and not tally.stopped:
                    milestones.leave_if_preempted(number, state)
            checkpoints.wait()
            milestones.finish()
    return state


def _resume(state: Any, loader: Loader, checkpoints: Checkpoints) -> tuple[Any, Tally, int | None]:
    """Returns the state and tally to begin with, and the step that they come from, if any."""
    latest = checkpoints.latest_verified()
    if latest is None:
        return state, Tally(), None
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # or the device would hold two states while one is restored
    state, extra = checkpoints.restore(latest, like)
    loader.restore(extra["loader"])
    logger.info("resuming after step %d, from %s", latest, checkpoints.directory)
    tally = Tally(**extra["tally"])
    checkpoints.pinned = tally.best_step
    return state, tally, latest


@contextlib.contextmanager
def _explained_interrupt(checkpoints: Checkpoints, run: RunDirectory) -> Iterator[None]:
    """Completes a save in progress when the user interrupts, and logs how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoints.wait()
        saved = checkpoints.steps()
        where = f"the checkpoint of step {saved[-1]}" if saved else "the start (no checkpoint yet)"
        logger.warning("interrupted; jaxtune train --workdir %s resumes from %s", run.path, where)
        raise
