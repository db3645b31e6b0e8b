"""`jaxtune plan`."""

from __future__ import annotations

import argparse

from jaxtune.commands.arguments import add_config

SUMMARY = "Estimate the memory and time of a run before it starts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--topology",
        metavar="CHIPS",
        help="target topology: cpu (default), v5e:1x1, v5p:2x2x1, h100:8 or 8xh100, …",
    )
    where.add_argument(
        "--device", metavar="CARD", help="a single GPU: rtx4090, rtx5090, a100-80g, mi300x, …"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, remat policies and micro-batches and rank the ones that fit",
    )
    parser.add_argument(
        "--tries",
        type=int,
        metavar="N",
        default=12,
        help="number of candidates that --search compiles (default: 12)",
    )
    parser.add_argument(
        "--table",
        action="store_true",
        help="plan DeepSeek-7B with full fine-tuning, LoRA, P-Tuning and QLoRA; needs no config",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.config import load_file, resolve
    from jaxtune.errors import JaxtuneError

    if arguments.table:
        from jaxtune.demos.memory_table import memory_table

        print(memory_table())
        return
    if not arguments.config:
        raise JaxtuneError("jaxtune plan: --config FILE is required (except with --table)")
    config = resolve(load_file(arguments.config), arguments.overrides)
    where = arguments.topology or "cpu"
    if arguments.device:
        from jaxtune.parallel.devices import gpu

        where = gpu(arguments.device).name
    if arguments.search:
        from jaxtune.planning.search import search

        found = search(config, where, arguments.tries)
        print(found.to_json() if arguments.json else found.render(), end="")
        return
    from jaxtune.planning.plan import plan

    result = plan(config, where)
    print(result.to_json() if arguments.json else result.render(), end="")
