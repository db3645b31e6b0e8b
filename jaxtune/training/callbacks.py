"""What happens between updates: evaluations, checkpoints, adapters, and the end of a run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jaxtune.config import Config
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import MetricLog
from jaxtune.training.durations import Due, Timeline
from jaxtune.training.early_stopping import Tally, consider
from jaxtune.training.preemption import Preempted, preempted
from jaxtune.training.recorder import Recorder, check_finite

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Milestones:
    """What is due after an update, and how it is done; see `fit` for the parts."""

    config: Config
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    save_adapter: Callable[[Any, Path], Any] | None
    run: RunDirectory
    checkpoints: Checkpoints
    loader: Any
    log: MetricLog
    recorder: Recorder
    tally: Tally
    timeline: Timeline | None = None

    def __post_init__(self) -> None:
        self._evaluating = Due("evaluation.every", self.config.evaluation.every, self.timeline)
        self._saving = Due("checkpoint.every", self.config.checkpoint.every, self.timeline)
        self._saved: int | None = None

    def reach(self, number: int, state: Any, last: bool = False) -> None:
        """Does what is due after update `number`; the last one is due for everything."""
        best, saving = False, self._saving(number)
        evaluates = self.evaluate is not None and not self._evaluating.never
        if evaluates and (self._evaluating(number) or last):
            best = self._evaluate(number, state)
        # A checkpoint is all there is to keep the best of full fine-tuning in.
        only_here = best and self.save_adapter is None
        # After the evaluation: a resumed run does not evaluate the step that it starts from.
        if last or saving or only_here or self.tally.stopped:
            self._save(number, state)

    def leave_if_preempted(self, number: int, state: Any) -> None:
        """Saves update `number` and ends the run with `Preempted` if that is asked for."""
        if not preempted(number):
            return
        if self._saved != number:
            self._save(number, state)
        self.checkpoints.wait()
        raise Preempted(
            f"stopped by SIGTERM after step {number}, which is saved; resume with jaxtune train "
            f"--workdir {self.run.path}"
        )

    def finish(self) -> None:
        """Logs the best evaluation and where its adapter is."""
        tally, metric = self.tally, self.config.evaluation.stop_metric
        if tally.skipped:
            counts = ", ".join(f"{count} {reason}" for reason, count in tally.skipped.items())
            logger.warning("updates that were skipped: %s", counts)
        if tally.best_step is None:
            return
        where: object = self.run.adapter_best
        if self.save_adapter is None:
            where = self.checkpoints.directory / str(tally.best_step)
        logger.info(
            "the best held-out %s is that of step %d, %.4f: %s",
            metric,
            tally.best_step,
            tally.best,
            where,
        )

    def _evaluate(self, number: int, state: Any) -> bool:
        """Returns whether nothing was better so far."""
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
                f", {name} {scores[name]:.4f}" for name in ("exact_match",) if name in scores
            )
            logger.info("step %d: held-out loss %.4f%s", number, scores["loss"], shown)
            best = consider(self.tally, number, scores, self.config.evaluation)
            if best:
                self._export(self.run.adapter_best, state)
                if self.save_adapter is None:
                    self.checkpoints.pinned = number
        return best

    def _save(self, number: int, state: Any) -> None:
        with self.recorder.paused():
            extra = {"loader": self.loader.state(), "tally": dataclasses.asdict(self.tally)}
            self.checkpoints.save(number, state, extra)
            self._saved = number
            self._export(self.run.adapter_last, state)

    def _export(self, target: Path, state: Any) -> None:
        if self.save_adapter is not None:
            self.run.replace_directory(target, partial(self.save_adapter, state.trainable))
