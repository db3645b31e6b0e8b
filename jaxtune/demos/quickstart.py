"""The quickstart: a small model before and after a fine-tune, on the same held-out questions."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from jaxtune.api import Model, Run, train
from jaxtune.api.evaluate_run import evaluate
from jaxtune.atomic_files import write_atomically
from jaxtune.data import read_rows
from jaxtune.errors import JaxtuneError
from jaxtune.progress import track
from jaxtune.runs.directory import RunDirectory

ROWS_PER_BATCH = 32
SAMPLES = 5


class Question(NamedTuple):
    """A held-out conversation: its turns, and the answer that is right."""

    turns: list[dict[str, str]]
    answer: str


def quickstart(config: Any, workdir: str | Path) -> dict[str, Any]:
    """Measures the base model, trains it, measures again and shows both.

    Every part that is done already is left as it is, so that an interrupted quickstart goes on.

    Args:
      config: resolved; ``data.eval`` holds rows of messages that end in the answer.
      workdir: of the run; ``result.json`` and ``before.json`` are written there too.

    Returns:
      The content of ``result.json``: ``before`` and ``after`` with ``loss`` and ``exact_match``
      (share of answers that are right to the letter), and ``seconds``.

    Raises:
      JaxtuneError: another run is in `workdir`, or anything that training can raise.
    """
    begin, console, directory = time.monotonic(), Console(), RunDirectory(workdir)
    with directory.start(config):
        pass  # freezes the config, or refuses another one
    if directory.result.is_file():
        console.print(f"The quickstart has been run: {directory.path} holds what came out of it.")
        result = json.loads(directory.result.read_text(encoding="utf-8"))
        _report(console, directory, result)
        return result
    questions = read_questions(config.data.eval)
    before_file = directory.path / "before.json"
    if not before_file.is_file():
        console.print(f"1/3  The base model answers {len(questions)} held-out questions.")
        answers = answer(Run(workdir).model("none"), questions)
        loss = evaluate(directory, "none")["loss"]
        measured = {"loss": loss, "exact_match": exact_match(answers, questions)}
        write_atomically(before_file, json.dumps(measured | {"answers": answers}, indent=2) + "\n")
    before = json.loads(before_file.read_text(encoding="utf-8"))
    console.print(f"2/3  Training, {_length(config.training)}.")
    started = time.monotonic()
    run = train(None, workdir)
    trained = time.monotonic() - started
    console.print("3/3  The trained model answers the same questions.")
    answers = answer(run.model("best"), questions)
    result = {
        "before": {name: before[name] for name in ("loss", "exact_match")},
        "after": {
            "loss": min(line["loss"] for line in run.evaluations()),
            "exact_match": exact_match(answers, questions),
        },
        "seconds": {"train": trained, "total": time.monotonic() - begin},
    }
    _show_samples(console, questions, before["answers"], answers)
    directory.write_result(result)
    _report(console, directory, result)
    return result


def read_questions(path: str) -> list[Question]:
    """Reads rows of messages, each of which ends in the assistant's answer.

    Raises:
      JaxtuneError: a row is of another form; the message names its line.
    """
    questions = []
    for row in read_rows(path):
        turns = row.values.get("messages")
        if not isinstance(turns, list) or not turns or turns[-1].get("role") != "assistant":
            raise JaxtuneError(f"{row.place}: not messages that end in an assistant's turn")
        questions.append(Question(turns[:-1], turns[-1]["content"]))
    return questions


def answer(model: Model, questions: Sequence[Question]) -> list[str]:
    """Answers every question greedily, in batches; returns the texts in order."""
    prompts = [model.encode(question.turns) for question in questions]
    # An answer that is longer than the longest right one is wrong, however it goes on.
    ends = [model.tokenizer(question.answer)["input_ids"] for question in questions]
    longest = max(map(len, ends)) + 1
    batches = -(-len(prompts) // ROWS_PER_BATCH)
    rows = -(-len(prompts) // batches)
    # Batches of one size and of similar lengths share a compilation and waste little on padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, str] = {}
    with track(batches, "answering") as advance:
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            texts = model.generate([prompts[index] for index in chosen], longest)
            answers |= zip(chosen, texts, strict=True)
            advance()
    return [answers[index].strip() for index in range(len(prompts))]


def exact_match(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Returns the share of answers that are right to the letter, from 0 to 1."""
    right = sum(a == question.answer for a, question in zip(answers, questions, strict=True))
    return right / len(questions)


def _length(training: Any) -> str:
    """Returns the length of a run as its ``training`` section gives it."""
    if training.epochs:
        return f"{training.epochs:g} epochs"
    return f"{training.tokens} tokens" if training.tokens else f"{training.steps} steps"


def _show_samples(
    console: Console, questions: Sequence[Question], before: Sequence[str], after: Sequence[str]
) -> None:
    table = Table("question", "base model", "after training", show_lines=True)
    step = max(1, len(questions) // SAMPLES)
    for index in range(0, step * SAMPLES, step):
        if index < len(questions):
            question = questions[index].turns[-1]["content"].splitlines()[-1]
            table.add_row(question, before[index], after[index])
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
        f"rm -r {directory.path}    # and make quickstart starts afresh",
    ):
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
