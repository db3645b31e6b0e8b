"""What a run writes down as it goes: JSON lines, and TensorBoard events beside them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from jaxtune.atomic_files import write_atomically
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import leads

METRICS, EVALUATIONS, TENSORBOARD = "metrics.jsonl", "evaluations.jsonl", "tensorboard"
SAMPLES = "samples.jsonl"


class MetricLog:
    """Appends to ``metrics.jsonl`` and ``evaluations.jsonl``; a context manager.

    Of several processes only the first one writes.

    Every line is a JSON object that starts with its ``step`` and is on disk when the call
    returns. A float32 is written so that reading it gives the same bits.
    """

    def __init__(self, directory: str | Path, tensorboard: bool, resume_step: int, wandb: str = ""):
        """Opens the log of a run that goes on after update number `resume_step`.

        Args:
          directory: the run's directory.
          tensorboard: write TensorBoard events too, under ``tensorboard/``.
          resume_step: updates that the state has seen, 0 for a new run. Later lines, which a
            killed run has written past its last checkpoint, are dropped: the file reads as one
            unbroken run.
          wandb: project of Weights & Biases to log to as well; empty: none.

        Raises:
          JaxtuneError: a line other than a torn last one is not a JSON object with a step.
        """
        directory = Path(directory)
        self._events: SummaryWriter | None = None
        self._metrics: TextIO | None = None
        self._evaluations: TextIO | None = None
        self._wandb: Any = None
        self._samples = directory / SAMPLES
        if not leads():
            return
        for name in (METRICS, EVALUATIONS, SAMPLES):
            _drop_after(directory / name, resume_step)
        self._samples = directory / SAMPLES
        self._metrics = (directory / METRICS).open("a", encoding="utf-8", buffering=1)
        self._evaluations = (directory / EVALUATIONS).open("a", encoding="utf-8", buffering=1)
        if tensorboard:
            # Tells TensorBoard to forget what the killed run has written past its checkpoint.
            purge = resume_step + 1 if resume_step else None
            self._events = SummaryWriter(str(directory / TENSORBOARD), purge_step=purge)
        self._wandb = _start_wandb(wandb, directory) if wandb else None

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of update number `step`, counted from 1.

        Args:
          step: updates done.
          values: ``loss``, ``learning_rate``, ``grad_norm``, ``tokens`` (shown so far, padding not
            counted), ``rows`` (shown so far), ``tokens_per_second`` and what else there is; finite
            numbers, or None and text where an update was skipped, which TensorBoard goes without.
        """
        self._write(self._metrics, "train", step, values)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the scores on the held-out set after update number `step`; finite numbers."""
        self._write(self._evaluations, "evaluation", step, values)

    def samples(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Writes answers to held-out prompts after update number `step`; what JSON can hold."""
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


def check_wandb(project: str) -> None:
    """Refuses a log that cannot be written, before anything else is done.

    Raises:
      JaxtuneError: Weights & Biases is asked for and not installed.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise JaxtuneError(
            f'logging.wandb="{project}" needs the package wandb, which is not installed: '
            "pip install wandb"
        )


def _start_wandb(project: str, directory: Path) -> Any:
    """Starts, or goes on with, the run of Weights & Biases that belongs to a directory."""
    check_wandb(project)
    wandb = importlib.import_module("wandb")
    identity = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project=project, id=identity, name=directory.name, dir=str(directory), resume="allow"
    )


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl`` or ``evaluations.jsonl``.

    Args:
      path: the file; one that does not exist has no lines.

    Returns:
      The objects in order, without a last line that was cut short while it was written.

    Raises:
      JaxtuneError: another line is not a JSON object with a step; names file and line.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    entries = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise JaxtuneError(
                f"{path}:{number}: not a JSON object with a step; mend or remove the line"
            ) from error
        entries.append(entry)
    return entries


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [entry for entry in read_lines(path) if entry["step"] <= step]
    text = "".join(json.dumps(entry) + "\n" for entry in kept)
    if text != path.read_text(encoding="utf-8", errors="replace"):
        write_atomically(path, text)
