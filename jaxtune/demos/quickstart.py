"""The quickstart: a small model answers held-out questions before and after fine-tuning."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jaxtune.api import train
from jaxtune.api.evaluate_run import evaluate
from jaxtune.atomic_files import write_atomically
from jaxtune.config import Config, TrainingConfig
from jaxtune.runs.directory import RunDirectory
from jaxtune.strict_json import read_object

SAMPLES = 5


def quickstart(config: Config, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the base model, trains it, evaluates the trained model and prints both results.

    The results of completed parts are kept, so that an interrupted quickstart can be resumed.

    Args:
      config: resolved config, with held-out questions in ``data.eval``.
      workdir: directory of the run; ``result.json`` and ``before.json`` are written there as well.

    Returns:
      The content of ``result.json``: ``before`` and ``after``, each with ``loss`` and
      ``exact_match`` (share of answers that equal the expected ones), and ``seconds``.

    Raises:
      JaxtuneError: `workdir` contains another run, or training fails.
    """
    begin, console, directory = time.monotonic(), Console(), RunDirectory(workdir)
    with directory.start(config):
        pass  # writes the config, or raises if the directory has another one
    if directory.result.is_file():
        console.print(f"The quickstart has already been run; its results are in {directory.path}.")
        result = read_object(directory.result)
        _report(console, directory, result)
        return result
    before_file = directory.path / "before.json"
    if not before_file.is_file():
        console.print("1/3  The base model answers the held-out questions.")
        write_atomically(before_file, json.dumps(_answers(directory, "none"), indent=2) + "\n")
    before = read_object(before_file)
    console.print(f"2/3  Training for {_length(config.training)}.")
    started = time.monotonic()
    train(None, workdir)
    trained = time.monotonic() - started
    console.print("3/3  The trained model answers the same questions.")
    after = _answers(directory, "best")
    result = {
        name: {score: scores[score] for score in ("loss", "exact_match")}
        for name, scores in (("before", before), ("after", after))
    }
    result["seconds"] = {"train": trained, "total": time.monotonic() - begin}
    _show_samples(console, after["expected"], before["answers"], after["answers"])
    directory.write_result(result)
    _report(console, directory, result)
    return result


def _answers(directory: RunDirectory, adapter: str) -> dict[str, Any]:
    """Evaluates a model; returns ``loss``, ``exact_match``, ``answers`` and ``expected``."""
    scores = evaluate(directory, adapter, answer_all=True)
    return {
        "loss": scores["loss"],
        "exact_match": scores["exact_match"],
        "answers": [sample["answer"] for sample in scores["samples"]],
        "expected": [sample["expected"] for sample in scores["samples"]],
    }


def _length(training: TrainingConfig) -> str:
    """Returns the length of the run in the unit of the ``training`` section."""
    if training.epochs:
        return f"{training.epochs:g} epochs"
    return f"{training.tokens} tokens" if training.tokens else f"{training.steps} steps"


def _show_samples(
    console: Console, expected: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> None:
    table = Table("expected answer", "base model", "after training", show_lines=True)
    step = max(1, len(expected) // SAMPLES)
    for index in range(0, min(step * SAMPLES, len(expected)), step):
        table.add_row(expected[index], before[index], after[index])
    console.print(table)


def _report(console: Console, directory: RunDirectory, result: dict[str, Any]) -> None:
    table = Table("held out", "before", "after")
    before, after = result["before"], result["after"]
    table.add_row("loss", f"{before['loss']:.3f}", f"{after['loss']:.3f}")
    table.add_row("exact match", f"{before['exact_match']:.1%}", f"{after['exact_match']:.1%}")
    console.print(table)
    seconds = result["seconds"]
    console.print(f"trained for {seconds['train']:.0f} s, {seconds['total']:.0f} s in all\n")
    for what, path in (
        ("adapter, in PEFT's format", directory.adapter_best),
        ("config", directory.config),
        ("metrics", directory.metrics),
        ("checkpoints", directory.checkpoints),
        ("result", directory.result),
    ):
        console.print(f"{what:<26} {path}", soft_wrap=True)
    prompt = r"Extract the record.\nThe poet Du Fu was born in Gongyi in 712."
    console.print("\nWhat to do next:", style="bold")
    for line in (
        f"jaxtune generate --workdir {directory.path} --prompt $'{prompt}'",
        f"jaxtune export --workdir {directory.path} --format merged --to out/model",
        "jaxtune train --config configs/quickstart.py --config.adapter.rank=8 --workdir runs/mine",
        f"rm -r {directory.path}    # then `make quickstart` starts from scratch",
    ):
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
