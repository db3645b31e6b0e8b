"""Actions between steps: evaluation, checkpoints, adapter export, and the end of a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxtune.config import Config
from jaxtune.parallel.processes import agree
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import MetricLog
from jaxtune.training.durations import Due, Timeline
from jaxtune.training.loop.callbacks import Callbacks
from jaxtune.training.loop.early_stopping import StopSettings, Tally, consider
from jaxtune.training.loop.preemption import Preempted, preempted
from jaxtune.training.loop.recorder import Recorder, check_finite
from jaxtune.training.scores import answer_scores

logger = logging.getLogger(__name__)

_STEPS_BETWEEN_AGREEMENTS = 10


@dataclasses.dataclass
class Actions:
    """Evaluation, checkpoints, adapter export, callbacks and preemption after a step.

    Attributes:
      config, evaluate, save_adapter, run, loader, timeline: the fields of `Trainer`.
      checkpoints: open checkpoint manager of the run.
      log: metric files.
      recorder: metrics of the steps; flushed before an evaluation or a save.
      tally: counters of the run.
      stopping: settings of early stopping, stored in every checkpoint.
      callbacks: callbacks of the user.
    """

    config: Config
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    save_adapter: Callable[[Any, Path], Any] | None
    run: RunDirectory
    loader: Any
    timeline: Timeline | None
    checkpoints: Checkpoints
    log: MetricLog
    recorder: Recorder
    tally: Tally
    stopping: StopSettings
    callbacks: Callbacks

    def __post_init__(self) -> None:
        self._evaluating = Due("evaluation.every", self.config.evaluation.every, self.timeline)
        self._saving = Due("checkpoint.every", self.config.checkpoint.every, self.timeline)
        self._saved: int | None = None
        self._announced: int | None = None  # the last saved step whose callbacks have run

    def after_step(self, number: int, state: Any, last: bool = False) -> None:
        """Evaluates and saves if due after step `number`.

        After the last step it always saves, and evaluates unless ``evaluation.every`` is 0.

        Raises:
          Preempted: a preemption notice was received; the step is saved.
        """
        best, saving = False, self._saving(number)
        evaluates = self.evaluate is not None and not self._evaluating.never
        if evaluates and (self._evaluating(number) or last):
            best = self._evaluate(number, state)
        # Full fine-tuning exports no adapter, so the best weights need a checkpoint.
        only_copy = best and self.save_adapter is None
        # The save comes after the evaluation and includes its result in the tally, so a resumed run
        # does not repeat the evaluation.
        if last or saving or only_copy or self.tally.stopped:
            self._save(number, state)
        if not last and not self.tally.stopped and preempted(number):
            self._leave(number, state)

    def _leave(self, number: int, state: Any) -> NoReturn:
        """Saves step `number` unless it is saved already, and raises `Preempted`."""
        if self._saved != number:
            self._save(number, state)
        self.checkpoints.wait()
        self.announce()
        raise Preempted(
            f"stopped by SIGTERM after step {number}, which is saved; resume with jaxtune train "
            f"--workdir {self.run.path}"
        )

    def announce(self) -> None:
        """Calls `Callback.on_checkpoint` if a checkpoint has become complete."""
        if self._saved != self._announced and not self.checkpoints.busy:
            self._announced = self._saved
            assert self._saved is not None
            self.callbacks.on_checkpoint(self._saved, self.checkpoints.directory / str(self._saved))

    def stop_requested(self, number: int, state: Any) -> bool:
        """Returns whether a callback ends the run after step `number`, which is then saved."""
        if not self.callbacks:
            return False
        # Agreeing waits for the device, so several processes do it only now and then.
        if jax.process_count() > 1 and number % _STEPS_BETWEEN_AGREEMENTS:
            return False
        if not agree(self.callbacks.stopping):
            return False
        if self._saved != number:
            self._save(number, state)
        logger.info(
            "stopped by a callback after step %d, which is saved; jaxtune train --workdir %s "
            "resumes the run",
            number,
            self.run.path,
        )
        return True

    def finish(self, number: int) -> None:
        """Logs the skipped steps, the best evaluation and the location of its weights.

        Calls `Callback.on_end` with the number of the last step.
        """
        self.announce()
        self._log_end()
        self.callbacks.on_end(number)

    def _log_end(self) -> None:
        tally, metric = self.tally, self.config.evaluation.stop_metric
        if tally.skipped:
            counts = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
            logger.warning("skipped steps: %s", counts)
        if tally.best_step is None:
            return
        where: object = self.run.adapter_best
        if self.save_adapter is None:
            where = self.checkpoints.directory / str(tally.best_step)
        logger.info(
            "best held-out %s: %.4f after step %d (%s)",
            metric,
            tally.best,
            tally.best_step,
            where,
        )

    def _evaluate(self, number: int, state: Any) -> bool:
        """Evaluates, writes the scores, and returns whether they are the best so far."""
        assert self.evaluate is not None
        with self.recorder.paused():
            scores = dict(self.evaluate(state.trainable))
            load, samples = scores.pop("expert_load", None), scores.pop("samples", None)
            check_finite(number, scores, "held-out ")
            self.log.evaluation(number, scores)
            if samples:
                self.log.samples(number, samples)
            if load is not None:
                self.run.write_expert_load({"step": number, "load": load})
            shown = "".join(
                f", {name} {scores[name]:.4f}" for name in answer_scores() if name in scores
            )
            logger.info("step %d: held-out loss %.4f%s", number, scores["loss"], shown)
            best = consider(self.tally, number, scores, self.config.evaluation)
            if best:
                self._export(self.run.adapter_best, state)
                if self.save_adapter is None:
                    self.checkpoints.pinned = number
            self.callbacks.on_evaluation(number, scores, best)
        return best

    def _save(self, number: int, state: Any) -> None:
        """Saves a checkpoint with the position in the data and the tally; exports the adapter."""
        with self.recorder.paused():
            extra = {
                "loader": self.loader.state(),
                "tally": dataclasses.asdict(self.tally),
                "stopping": self.stopping._asdict(),
                "logged": self.log.logged(),
            }
            self.checkpoints.wait()
            self.announce()
            export = partial(self._export, self.run.adapter_last, state)
            self.checkpoints.save(number, state, extra, export)
            self._saved = number

    def _export(self, target: Path, state: Any) -> None:
        if self.save_adapter is not None:
            self.run.replace_directory(target, partial(self.save_adapter, state.trainable))
