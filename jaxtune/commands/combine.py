"""`jaxtune combine`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxtune.atomic_files import refuse_taken
from jaxtune.commands.combination import (
    add_combination,
    parse_adapters,
    parse_method,
    parse_weights,
)

SUMMARY = "Combine several LoRA adapters into one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--adapter",
        metavar="NAME=DIR",
        action="append",
        required=True,
        help="name and PEFT directory of an adapter; repeat for each adapter",
    )
    add_combination(parser)
    parser.add_argument("--to", metavar="DIR", required=True, help="output directory")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    directories = parse_adapters(arguments.adapter)
    weights = parse_weights(arguments.weights, list(directories))
    refuse_taken(arguments.to)

    from jaxtune.adapter_files.combine import combine
    from jaxtune.adapter_files.peft import read_adapter, write_adapter
    from jaxtune.checkpoints.chat import Chat, adapter_chat, combined_chat

    method, options = parse_method(arguments)
    stored = {name: read_adapter(directories[name]) for name in weights}
    chats = {name: adapter_chat(Path(directories[name]), Chat(None, {}, ())) for name in weights}
    chat = combined_chat(chats)
    written = write_adapter(
        arguments.to, combine(stored, weights, method, options), chat.files() if chat else None
    )
    print(f"written: {written}")
