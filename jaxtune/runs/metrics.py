"""Metrics of a run: JSON lines, TensorBoard events and Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tensorboardX import SummaryWriter

from jaxtune.atomic_files import write_atomically
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import leads
from jaxtune.runs.paths import CHECKPOINTS, EVALUATIONS, EXTRA, METRICS
from jaxtune.strict_json import entry, read_object, read_objects

SAMPLES, TENSORBOARD = "samples.jsonl", "tensorboard"
_MOST_STEPS = 10**8  # between the ranges of a checkpoint, which may be damaged
_MOST_SHOWN = 10**5  # lost steps that are summarized
_logger = logging.getLogger(__name__)


class MetricLog:
    """A context manager that appends to the JSON-lines files of a run and to other loggers.

    Only process 0 writes. Every line of ``metrics.jsonl``, ``evaluations.jsonl`` and
    ``samples.jsonl`` is a JSON object whose first key is ``step``, and is written when the call
    returns. A float32 value is read back with the same bits.
    """

    def __init__(self, directory: str | Path, tensorboard: bool, resume_step: int, wandb: str = ""):
        """Opens the logs of a run.

        Args:
          directory: directory of the run.
          tensorboard: whether to write TensorBoard events to ``tensorboard/`` as well.
          resume_step: step to resume from, 0 for a new run. Lines of later steps, which an
            interrupted run wrote after its last checkpoint, are dropped, because the resumed run
            writes them again.
          wandb: Weights & Biases project to log to as well; empty: none.

        Raises:
          JaxtuneError: a line is not a JSON object with a step; an incomplete last line is allowed.
        """
        directory = Path(directory)
        self._events: SummaryWriter | None = None
        self._metrics: TextIO | None = None
        self._evaluations: TextIO | None = None
        self._wandb: Any = None
        self._samples: Path | None = None
        self._logged: dict[str, Steps] = {}
        if not leads():
            return
        self._samples = directory / SAMPLES
        for name in (METRICS, EVALUATIONS, SAMPLES):
            _drop_after(directory / name, resume_step)
        self._logged = {
            name: Steps(line["step"] for line in read_lines(directory / name))
            for name in (METRICS, EVALUATIONS)
        }
        if resume_step:
            self._report_lost(directory, resume_step)
        self._metrics = (directory / METRICS).open("a", encoding="utf-8", buffering=1)
        self._evaluations = (directory / EVALUATIONS).open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            # Makes TensorBoard discard events that an interrupted run wrote after its checkpoint.
            purge = resume_step + 1 if resume_step else None
            self._events = SummaryWriter(str(directory / TENSORBOARD), purge_step=purge)
        self._wandb = _start_wandb(wandb, directory) if wandb else None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a training step.

        Args:
          step: step number, from 1.
          values: ``loss``, ``learning_rate``, ``grad_norm``, ``tokens`` (seen so far, without
            padding), ``rows`` (seen so far), ``tokens_per_second`` and others: finite numbers; for
            a skipped step also None and text, which are written to ``metrics.jsonl`` only.
        """
        self._write(self._metrics, "train", step, values)
        if leads():
            self._logged[METRICS].add(step)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the scores of an evaluation after `step` steps, finite numbers by name."""
        self._write(self._evaluations, "evaluation", step, values)
        if leads():
            self._logged[EVALUATIONS].add(step)

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Writes generated answers to held-out prompts after `step` steps."""
        if self._samples is None:
            return
        with self._samples.open("a", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Closes the files."""
        for file in (self._metrics, self._evaluations, self._events):
            if file is not None:
                file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def logged(self) -> dict[str, list[list[int]]]:
        """Returns the steps that have a line, as ranges by file; a checkpoint stores them."""
        return {name: steps.ranges() for name, steps in self._logged.items()}

    def _report_lost(self, directory: Path, step: int) -> None:
        """Warns of lines that the files had when a checkpoint was saved, and have no longer."""
        extra = directory / CHECKPOINTS / str(step) / EXTRA
        stored = read_object(extra).get("logged") if extra.is_file() else None
        lost = []
        for name, ranges in stored.items() if isinstance(stored, dict) else ():
            found = self._logged[name].ranges() if name in self._logged else []
            missing = missing_steps(ranges, found)
            if len(missing):
                more = ", …" if len(missing) > _MOST_SHOWN else ""
                steps = Steps(map(int, missing[:_MOST_SHOWN]))
                lost.append(f"{name} lacks the lines of steps {steps}{more}")
        if lost:
            _logger.warning(
                "%s: %s: deleted or cut since they were written, and not computed again",
                *(directory, "; ".join(lost)),
            )

    def _write(
        self, file: TextIO | None, prefix: str, step: int, values: Mapping[str, Any]
    ) -> None:
        if file is None:
            return
        file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        numbers = {
            f"{prefix}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float))
        }
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)


class Steps:
    """A set of steps that compares and prints as ranges, such as ``1–5, 8``."""

    def __init__(self, steps: Iterable[int] = ()):
        """Collects steps in any order."""
        self._ranges: list[list[int]] = []
        for step in sorted(set(steps)):
            self.add(step)

    def add(self, step: int) -> None:
        """Adds a step after all others, or one that is the last."""
        last = self._ranges[-1] if self._ranges else None
        if last is None:
            self._ranges.append([step, step, 1])
        elif last[0] == last[1] < step:
            last[1], last[2] = step, step - last[0]
        elif step == last[1] + last[2]:
            last[1] = step
        elif step > last[1]:
            self._ranges.append([step, step, 1])

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __str__(self) -> str:
        shown = [
            str(first) if first == last else f"{first}–{last}" + (f" by {by}" if by > 1 else "")
            for first, last, by in self._ranges
        ]
        return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")

    def ranges(self) -> list[list[int]]:
        """Returns the ranges as [first, last, distance]."""
        return [list(each) for each in self._ranges]


def missing_steps(stored: Any, found: Iterable[Sequence[int]]) -> np.ndarray:
    """Returns the steps in some ranges that are not in others, ascending, as int64 [steps].

    Args:
      stored: ranges as in `Steps.ranges`, from a file; damaged ones are left out.
      found: result of `Steps.ranges`.
    """
    ranges = [each for each in stored if _is_range(each)] if isinstance(stored, list) else []
    low = min((first for first, _, _ in ranges), default=0)
    high = max((last for _, last, _ in ranges), default=-1)
    if high - low >= _MOST_STEPS:
        return np.zeros(0, np.int64)
    missing = np.zeros(high - low + 1, bool)  # a byte per step
    for first, last, by in ranges:
        missing[first - low : last - low + 1 : by] = True
    for first, last, by in found:
        first += max(0, -((first - low) // by)) * by  # the first one from `low` on
        if first <= last:
            missing[first - low : last - low + 1 : by] = False
    return np.flatnonzero(missing) + low


def _is_range(value: Any) -> bool:
    match value:
        case [int(first), int(last), int(by)]:
            return by > 0 and 0 <= first <= last
    return False


def check_wandb(project: str) -> None:
    """Checks before a run starts that Weights & Biases can be used.

    Raises:
      JaxtuneError: a project is given and the package is not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise JaxtuneError(
            f'logging.wandb="{project}" requires the package wandb, which is not installed; run '
            "`pip install wandb`"
        )


def _start_wandb(project: str, directory: Path) -> Any:
    """Starts or resumes the Weights & Biases run of a directory."""
    check_wandb(project)
    wandb = importlib.import_module("wandb")
    identity = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project=project, id=identity, name=directory.name, dir=str(directory), resume="allow"
    )


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl`` or ``evaluations.jsonl``.

    Args:
      path: path of the file; a missing file is read as empty.

    Returns:
      The objects in order, without an incomplete last line.

    Raises:
      JaxtuneError: a line is not a JSON object with a step; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    return [line for _, line in _entries(path)]


def _entries(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines of a file, and the objects in them."""
    try:
        for text, place, line in read_objects(path, appended=True):
            entry(line, "step", int, place)
            yield text, line
    except JaxtuneError as error:
        raise JaxtuneError(f"{error}; fix or remove the line") from error


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and an incomplete last line."""
    if not path.exists():
        return
    # The lines themselves, because encoding them again could change them.
    kept = b"".join(text + b"\n" for text, line in _entries(path) if line["step"] <= step)
    if len(kept) != path.stat().st_size:
        write_atomically(path, kept.decode())
