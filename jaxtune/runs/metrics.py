"""Metrics of a run: JSON lines, TensorBoard events and Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from tensorboardX import SummaryWriter

from jaxtune.atomic_files import write_atomically
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import leads
from jaxtune.strict_json import entry, read_objects

METRICS, EVALUATIONS, TENSORBOARD = "metrics.jsonl", "evaluations.jsonl", "tensorboard"
SAMPLES = "samples.jsonl"


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
        if not leads():
            return
        self._samples = directory / SAMPLES
        for name in (METRICS, EVALUATIONS, SAMPLES):
            _drop_after(directory / name, resume_step)
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

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the scores of an evaluation after `step` steps, finite numbers by name."""
        self._write(self._evaluations, "evaluation", step, values)

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
