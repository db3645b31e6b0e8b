"""`jaxtune eval`."""

from __future__ import annotations

import argparse
import json

from jaxtune.commands.arguments import add_adapter, add_workdir

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


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.api.evaluate_run import evaluate
    from jaxtune.runs.directory import RunDirectory

    adapter = "none" if arguments.base_only else arguments.adapter
    scores = evaluate(RunDirectory(arguments.workdir), adapter, arguments.data)
    if arguments.json:
        print(json.dumps(scores))
        return
    print(f"loss            {scores['loss']:.4f}")
    print(f"perplexity      {scores['perplexity']:.4f}")
    print(f"token accuracy  {scores['token_accuracy']:.2%}")
    print(f"target tokens   {scores['tokens']:,.0f}")
    for name, value in scores.items():
        if "/" in name or name == "exact_match":  # scores of named sets; of generated answers
            print(f"{name:<15} {value:.4g}")
