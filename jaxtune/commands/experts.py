"""`jaxtune experts`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtune.atomic_files import refuse_taken
from jaxtune.commands.arguments import add_config, choice
from jaxtune.errors import JaxtuneError

SUMMARY = "Score routed experts on the training data, for ESFT."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "action", type=choice("score"), metavar="score", help="score: compute expert scores"
    )
    add_config(parser, required=True)
    parser.add_argument("--to", metavar="FILE", required=True, help="output file")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.config import load_file, resolve
    from jaxtune.training.score_experts import summarize
    from jaxtune.training.train import score_training_data

    path = Path(arguments.to)
    refuse_taken(path)
    if path.is_dir():
        raise JaxtuneError(f"{path}: is a directory; choose another path")
    overrides = ["adapter.method=esft", *arguments.overrides]
    config = resolve(load_file(arguments.config), overrides)
    scores = score_training_data(config)
    print(summarize(scores, config.adapter))
    path.write_text(scores.to_json(), encoding="utf-8")
    print(f"written: {path}")
