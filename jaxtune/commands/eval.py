"""`jaxtune eval`."""

from __future__ import annotations

import argparse
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.commands.arguments import add_adapter, add_workdir
from jaxtune.commands.processes import add_processes, joined
from jaxtune.errors import JaxtuneError

SUMMARY = "Evaluate a run on held-out examples."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_workdir(parser)
    parser.add_argument(
        "--data", metavar="FILE", default="", help="examples to use instead of data.eval"
    )
    add_adapter(parser)
    parser.add_argument("--base-only", action="store_true", help="evaluate the base model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="Python file that registers scores with jaxtune.register_score, such as the config "
        "file of the run",
    )
    parser.add_argument(
        "--generate",
        type=int,
        metavar="N",
        help="number of prompts of each held-out set to answer (default: evaluation.generate)",
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.api.evaluate_run import evaluate
    from jaxtune.runs.directory import RunDirectory

    adapter = "none" if arguments.base_only else arguments.adapter
    count = arguments.generate
    if count is not None and count < 0:
        raise JaxtuneError(f"jaxtune eval: --generate={count} is not a number of prompts")
    with joined(arguments) as leads:
        directory = RunDirectory(arguments.workdir)
        if arguments.scores:
            if not (directory.read_config().evaluation.generate if count is None else count):
                raise JaxtuneError(
                    f"--scores={arguments.scores}: scores rate generated answers, and the run "
                    "generates none: give the number of prompts with --generate N"
                )
            _register_scores(Path(arguments.scores))
        scores = evaluate(directory, adapter, arguments.data, generate=count)
        if leads:
            _print(scores, arguments.json)


def _print(scores: Mapping[str, Any], as_json: bool) -> None:
    from jaxtune.training.scores import answer_scores

    if as_json:
        print(json.dumps(scores))
        return
    print(f"loss            {scores['loss']:.4f}")
    print(f"perplexity      {scores['perplexity']:.4f}")
    print(f"token accuracy  {scores['token_accuracy']:.2%}")
    print(f"target tokens   {scores['tokens']:,.0f}")
    for name, value in scores.items():
        if "/" in name or name in answer_scores():  # scores of named sets; of generated answers
            print(f"{name:<15} {value:.4g}")


def _register_scores(path: Path) -> None:
    """Runs a Python file that registers scores.

    Raises:
      JaxtuneError: the file does not exist, fails or registers nothing.
    """
    from jaxtune.training.scores import answer_scores

    before = answer_scores()
    if not path.is_file():
        raise JaxtuneError(f"--scores={path}: no such file")
    try:
        runpy.run_path(str(path))
    except JaxtuneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise JaxtuneError(f"--scores={path}: {type(error).__name__}: {reason}") from error
    if answer_scores() == before:
        raise JaxtuneError(f"--scores={path}: registers no score (jaxtune.register_score)")
