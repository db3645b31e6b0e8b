"""`jaxtune data`."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Unpack

from jaxtune.commands.arguments import add_config, choice
from jaxtune.config import Config
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxtune.checkpoints.source import TensorSource
    from jaxtune.data import DataReader, Examples, ReaderOptions
    from jaxtune.data.encode import Problem
    from jaxtune.training.durations import Timeline

SUMMARY = "Inspect the data of a run, or tokenize it in advance."
_ACTIONS = ("inspect", "stats", "order", "prepare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "action",
        type=choice(*_ACTIONS),
        metavar="ACTION",
        help="inspect (show examples and their targets), stats (statistics and rejected rows), "
        "order (rows of each step, as JSON lines) or prepare (tokenize into the cache that train "
        "uses)",
    )
    add_config(parser, required=True)
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="inspect: number of examples (default: 3)"
    )
    parser.add_argument(
        "--split",
        type=choice("train", "eval"),
        default="train",
        metavar="WHICH",
        help="inspect: train (default) or eval",
    )
    parser.add_argument("--json", action="store_true", help="stats: print JSON")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="prepare: number of processes (default: the number of CPU cores)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.config import load_file, resolve

    config = resolve(load_file(arguments.config), arguments.overrides)
    actions = {"inspect": _inspect, "stats": _stats, "order": _order, "prepare": _prepare}
    actions[arguments.action](config, arguments)


def _reader(
    config: Config, **options: Unpack[ReaderOptions]
) -> tuple[DataReader, TensorSource, PreTrainedTokenizerBase | None]:
    """Returns the data reader of a run with this config, the model's checkpoint and tokenizer."""
    from jaxtune.checkpoints.open_model import open_model
    from jaxtune.runs.chat import configured_chat, reader_options
    from jaxtune.training.train import data_reader

    source = open_model(config.model.path, config.model.revision).source
    chat = configured_chat(config, source)
    options |= reader_options(config.data, chat)
    reader = data_reader(config, source, chat.tokenizer, **options)
    return reader, source, chat.tokenizer


def _inspect(config: Config, arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from jaxtune.data.report import show_example

    reader, _, tokenizer = _reader(config)
    splits = reader.splits()
    examples = splits.train if arguments.split == "train" else splits.held_out
    if examples is None:
        raise JaxtuneError("--split eval: no held-out data; set data.eval or data.eval_split")
    console = Console()
    for index in range(min(max(arguments.rows, 1), len(examples))):
        text = show_example(examples, index, tokenizer, marks=not console.is_terminal)
        # Without hard line breaks at the width of the console, which would end up in files.
        console.print(text, soft_wrap=True)


def _stats(config: Config, arguments: argparse.Namespace) -> None:
    from jaxtune.data.report import count_overlap, render_statistics, statistics
    from jaxtune.data.splits import Splits, hold_out, resolve_overlap
    from jaxtune.training.evaluation import held_out_order
    from jaxtune.training.train import reserved_tokens

    problems: list[Problem] = []
    reader, source, _ = _reader(config, problems=problems)
    # Not `DataReader.splits`, which raises for rows in both splits; here they are counted.
    train, bad = reader.read(config.data.train, training=True), len(problems)
    other_sides: tuple[int | None, int | None] = (None, None)
    if config.data.eval_split:
        splits = hold_out(train, config.data.eval_split)
        other_sides = (splits.sets[""].row_count, splits.train.row_count)
    else:
        splits = Splits(train, reader.read_sets(config.data.eval))
    train, held_out = splits.train, splits.held_out
    shown = train
    if held_out is not None and config.data.overlap == "drop":
        shown = resolve_overlap(train, held_out, config.data.overlap)
    timeline = _timeline(config, shown, source)
    numbers = {"train": statistics(train, problems[:bad], timeline.order, other_sides[0])}
    steps = timeline.total_steps(config.training)
    numbers["train"]["run"] = {"steps": steps, "text": timeline.describe(steps)}
    if held_out is not None:
        numbers["train"]["held_out_too"] = count_overlap(train, held_out)
        order = held_out_order(config, held_out, reserved_tokens(config, source.config))
        # With data.eval_split the problems are listed once, under the training split.
        numbers["eval"] = statistics(held_out, problems[bad:], order, other_sides[1])
    if arguments.json:
        print(json.dumps(numbers, indent=2, ensure_ascii=False))
    else:
        print("\n\n".join(render_statistics(name, part) for name, part in numbers.items()))


def _timeline(config: Config, train: Examples, source: TensorSource) -> Timeline:
    from jaxtune.training.durations import Timeline
    from jaxtune.training.train import make_order, reserved_tokens

    return Timeline(make_order(config, train, reserved_tokens(config, source.config)))


def _order(config: Config, arguments: argparse.Namespace) -> None:
    """Prints the row numbers of each step of the run, as JSON lines."""
    del arguments
    reader, source, _ = _reader(config)
    train = reader.splits().train
    timeline = _timeline(config, train, source)
    steps, number, within = timeline.total_steps(config.training), 0, 0
    for step in range(1, steps + 1):
        plan = timeline.order.plan(number)
        inside = plan.examples[plan.shown[within] : plan.shown[within + 1]]
        rows = train.row_of_example[inside].tolist()
        print(json.dumps({"step": step, "pass": number + 1, "rows": rows}))
        within += 1
        if within == plan.steps:
            number, within = number + 1, 0


def _prepare(config: Config, arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    reader, *_ = _reader(config, keep=True, workers=max(arguments.workers, 1))
    splits = reader.splits()
    tokens = splits.train.token_count + sum(each.token_count for each in splits.sets.values())
    print(
        f"prepared: {tokens:,} tokens in {time.monotonic() - begin:.1f} s, cached in {reader.cache}"
    )
