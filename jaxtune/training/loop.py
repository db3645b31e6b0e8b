"""The training loop: update, log, evaluate, save, and go on after any interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from jaxtune.checkpoints.orbax import Checkpoints, disk_full_named
from jaxtune.errors import JaxtuneError
from jaxtune.training.interruption import Preempted, preempted, watchdog
from jaxtune.training.metrics import MetricLog
from jaxtune.training.run import RunDirectory

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal to draw a bar on


class Loader(Protocol):
    """An endless iterator over batches that can say where it is and go back there."""

    def __next__(self) -> Any:
        """Returns the next batch, a pytree of NumPy arrays."""

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch, as JSON can hold it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` has returned."""


@dataclasses.dataclass
class Tally:
    """What a run has counted so far; every checkpoint holds it."""

    tokens: int = 0
    best_loss: float | None = None


def fit(
    *,
    state: Any,
    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]],
    loader: Loader,
    evaluate: Callable[[Any], Mapping[str, Any]] | None,
    save_adapter: Callable[[Any, Path], Any] | None,
    run: RunDirectory,
    config: Any,
) -> Any:
    """Trains to ``training.steps``, from the run's newest undamaged checkpoint if it has one.

    On a deterministic backend a run that was killed at any moment goes on to the same losses,
    bit for bit, as one that was not.

    Args:
      state: the state of a new run, a pytree of `jax.Array` with an attribute ``trainable``. It
        is consumed: use what is returned.
      step: ``(state, batch) -> (state, metrics)``, jitted, may donate the state; metrics are
        scalars, with ``loss``, ``grad_norm``, ``learning_rate`` and ``tokens`` (targets in the
        batch) among them.
      loader: gives the batches.
      evaluate: ``trainable -> scores`` on the held-out set, ``loss`` among them; numbers, but
        for ``expert_load``, which is written to a file of its own. None: no set.
      save_adapter: writes the trainables to a directory; None: the checkpoints hold all there is.
      run: the run's directory, started.
      config: the run's resolved config.

    Returns:
      The state after ``training.steps`` updates.

    Raises:
      JaxtuneError: a metric or score is not finite (the update is never saved), no space left on
        the disk, or a checkpoint that does not fit.
      Preempted: SIGTERM, or a notice of the machine's; every process has saved the same step.
      KeyboardInterrupt: passed on after the save in progress, if any, is complete.
    """
    steps = config.training.steps
    with (
        disk_full_named(run.path),
        Checkpoints(run.checkpoints, config.checkpoint.keep) as checkpoints,
        _explained_interrupt(checkpoints, run),
    ):
        state, tally, resumed = _resume(state, loader, checkpoints)
        start = resumed or 0
        if resumed is not None and save_adapter is not None:
            # The adapter on disk may be of another step than the checkpoint that was restored.
            run.replace_directory(run.adapter_last, partial(save_adapter, state.trainable))
        with (
            MetricLog(run.path, config.logging.tensorboard, start) as log,
            _Display(start, steps) as display,
            watchdog(config.training.watchdog_minutes) as dog,
        ):
            recorder = _Recorder(log, display, tally, config.logging.every)
            milestones = _Milestones(
                config, evaluate, save_adapter, run, checkpoints, loader, log, recorder, tally
            )
            for number in range(start + 1, steps + 1):
                state, metrics = step(state, next(loader))
                recorder.put(number, metrics)
                checkpoints.poll()
                dog.step()
                if number < steps:
                    milestones.reach(number, state)
                    milestones.leave_if_preempted(number, state)
            if resumed != steps:
                milestones.reach(steps, state, last=True)
            checkpoints.wait()
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
    logger.info("going on after step %d, from %s", latest, checkpoints.directory)
    return state, Tally(**extra["tally"]), latest


@contextlib.contextmanager
def _explained_interrupt(checkpoints: Checkpoints, run: RunDirectory) -> Iterator[None]:
    """Lets a save in progress complete when the user interrupts, and says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoints.wait()
        saved = checkpoints.steps()
        where = f"the checkpoint of step {saved[-1]}" if saved else "the start (no checkpoint yet)"
        logger.warning("interrupted; jaxtune train --workdir %s goes on from %s", run.path, where)
        raise


@dataclasses.dataclass
class _Milestones:
    """What happens between updates: evaluations, checkpoints, adapters."""

    config: Any
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    save_adapter: Callable[[Any, Path], Any] | None
    run: RunDirectory
    checkpoints: Checkpoints
    loader: Loader
    log: MetricLog
    recorder: _Recorder
    tally: Tally

    def reach(self, number: int, state: Any, last: bool = False) -> None:
        """Does what is due after update `number`; the last one is due for everything."""
        evaluating, saving = self.config.evaluation.every, self.config.checkpoint.every
        if evaluating and (last or number % evaluating == 0):
            self._evaluate(number, state)
        # After the evaluation: a resumed run does not evaluate the step that it starts from.
        if last or (saving and number % saving == 0):
            self._save(number, state)

    def leave_if_preempted(self, number: int, state: Any) -> None:
        """Saves update `number` and ends the run with `Preempted` if that is asked for."""
        if not preempted(number):
            return
        saving = self.config.checkpoint.every
        if not (saving and number % saving == 0):
            self._save(number, state)
        self.checkpoints.wait()
        raise Preempted(
            f"stopped by SIGTERM after step {number}, which is saved; jaxtune train --workdir "
            f"{self.run.path} goes on"
        )

    def _evaluate(self, number: int, state: Any) -> None:
        if self.evaluate is None:
            return
        with self.recorder.paused():
            scores = dict(self.evaluate(state.trainable))
            load = scores.pop("expert_load", None)
            _check_finite(number, scores, "held-out ")
            self.log.evaluation(number, scores)
            if load is not None:
                self.run.write_expert_load({"step": number, "load": load})
            logger.info("step %d: held-out loss %.4f", number, scores["loss"])
            if self.tally.best_loss is None or scores["loss"] < self.tally.best_loss:
                self.tally.best_loss = scores["loss"]
                self._export(self.run.adapter_best, state)

    def _save(self, number: int, state: Any) -> None:
        with self.recorder.paused():
            extra = {"loader": self.loader.state(), "tally": dataclasses.asdict(self.tally)}
            self.checkpoints.save(number, state, extra)
            self._export(self.run.adapter_last, state)

    def _export(self, target: Path, state: Any) -> None:
        if self.save_adapter is not None:
            self.run.replace_directory(target, partial(self.save_adapter, state.trainable))


class _Recorder:
    """Reads metrics one update late, so that the next update is queued before the host waits."""

    def __init__(self, log: MetricLog, display: _Display, tally: Tally, every: int):
        self._log, self._display, self._tally, self._every = log, display, tally, every
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens, self._clock = 0, time.monotonic()  # of the line being gathered

    def put(self, number: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of an update that may still run, and reads those of the one before."""
        self.flush()
        self._pending = (number, metrics)

    def flush(self) -> None:
        """Waits for the update last put, checks its metrics and writes them down."""
        if self._pending is None:
            return
        (number, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        # The loss leads: jit has sorted the names, and it is what one looks for.
        values = {"loss": values["loss"], **values}
        _check_finite(number, values)
        tokens = int(values["tokens"])
        self._tally.tokens += tokens
        self._tokens += tokens
        speed = self._tokens / max(time.monotonic() - self._clock, 1e-9)
        values |= {"tokens": self._tally.tokens, "tokens_per_second": speed}
        self._display.show(number, values["loss"], speed)
        if self._every and number % self._every == 0:
            self._log.train(number, values)
            self._tokens, self._clock = 0, time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Flushes, and keeps the time of the block out of the tokens per second."""
        self.flush()
        begin = time.monotonic()
        yield
        self._clock += time.monotonic() - begin


class _Display:
    """A progress bar on a terminal; elsewhere a line in the log now and then."""

    def __init__(self, start: int, steps: int):
        console = Console(stderr=True)
        self._steps = steps
        self._due = 0.0 if not console.is_terminal else math.inf
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "train", total=steps, completed=start, loss=math.nan, speed=0.0
        )

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def show(self, number: int, loss: float, speed: float) -> None:
        """Shows that update `number` is done, with its loss and the tokens per second."""
        self._bar.update(self._task, completed=number, loss=loss, speed=speed)
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + SECONDS_BETWEEN_LINES
            logger.info("step %d/%d: loss %.4f, %.0f tokens/s", number, self._steps, loss, speed)


def _check_finite(number: int, values: Mapping[str, float], prefix: str = "") -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise JaxtuneError(
                f"step {number}: {prefix}{name} is {value}; stopped, and nothing of it was saved "
                "(a lower optimizer.learning_rate or optimizer.clip_norm may help)"
            )
