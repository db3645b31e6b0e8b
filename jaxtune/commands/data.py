"""`jaxtune data`."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Any

from jaxtune.commands.arguments import add_config, choice
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from jaxtune.data import DataReader

SUMMARY = "Look at a run's data, or tokenize it ahead."
_ACTIONS = ("inspect", "stats", "prepare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "action",
        type=choice(*_ACTIONS),
        metavar="ACTION",
        help="inspect (examples with their targets), stats (numbers, and rows that are rejected) "
        "or prepare (tokenize into the cache, which train uses)",
    )
    add_config(parser, required=True)
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="inspect: how many")
    parser.add_argument(
        "--split",
        type=choice("train", "eval"),
        default="train",
        metavar="WHICH",
        help="inspect: train (the default) or eval",
    )
    parser.add_argument("--json", action="store_true", help="stats: print JSON")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="prepare: processes; as many as there are cores by default",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.config import load_file, resolve

    config = resolve(load_file(arguments.config), arguments.overrides)
    {"inspect": _inspect, "stats": _stats, "prepare": _prepare}[arguments.action](config, arguments)


def _reader(config: Any, **options: Any) -> tuple[DataReader, Any]:
    """Returns what reads the data, and the tokenizer."""
    from jaxtune.checkpoints import huggingface
    from jaxtune.checkpoints.tokenizer import load_tokenizer
    from jaxtune.training.train import data_reader

    location = huggingface.resolve_path(config.model.path, config.model.revision)
    tokenizer = load_tokenizer(location)
    return data_reader(config, huggingface.open_source(location), tokenizer, **options), tokenizer


def _inspect(config: Any, arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jaxtune.data.report import show_example

    reader, tokenizer = _reader(config)
    splits = reader.splits()
    examples = splits.train if arguments.split == "train" else splits.held_out
    if examples is None:
        raise JaxtuneError("--split eval: data.eval and data.eval_split hold nothing out")
    console = Console()
    for index in range(min(max(arguments.rows, 1), len(examples))):
        text = show_example(examples, index, tokenizer, marks=not console.is_terminal)
        # Lines of a file are not to be broken where a terminal's would be.
        console.print(text, soft_wrap=True)


def _stats(config: Any, arguments: argparse.Namespace) -> None:
    from jaxtune.data.report import count_overlap, render_statistics, statistics
    from jaxtune.data.splits import Splits, hold_out
    from jaxtune.training.evaluation import held_out_batches
    from jaxtune.training.train import make_loader

    problems: list[Any] = []
    reader, _ = _reader(config, problems=problems)
    # Not `splits`, which refuses rows that are on both sides: they are counted here.
    train, bad = reader.read(config.data.train, training=True), len(problems)
    if config.data.eval_split:
        splits = hold_out(train, config.data.eval_split)
    else:
        splits = Splits(train, reader.read_sets(config.data.eval))
    train, held_out = splits.train, splits.held_out
    numbers = {"train": statistics(train, problems[:bad], make_loader(config, train))}
    if held_out is not None:
        numbers["train"]["held_out_too"] = count_overlap(train, held_out)
        batches = held_out_batches(config, held_out)
        numbers["eval"] = statistics(held_out, problems[bad:], batches)
    if arguments.json:
        print(json.dumps(numbers, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(render_statistics(name, part) for name, part in numbers.items()))


def _prepare(config: Any, arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    reader, _ = _reader(config, keep=True, workers=max(arguments.workers, 1))
    splits = reader.splits()
    tokens = splits.train.token_count + sum(each.token_count for each in splits.sets.values())
    print(
        f"prepared: {tokens:,} tokens in {time.monotonic() - begin:.1f} s, kept in {reader.cache}"
    )
