"""`jaxtune plan`."""

from __future__ import annotations

import argparse

from jaxtune.commands.arguments import add_config

SUMMARY = "Say what a run would need, before it starts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config(parser, required=True)
    parser.add_argument(
        "--topology", metavar="CHIPS", default="cpu", help="cpu (the default), v5e:1x1, v5p:2x2x1 …"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.config import load_file, resolve
    from jaxtune.planning.plan import plan

    result = plan(resolve(load_file(arguments.config), arguments.overrides), arguments.topology)
    print(result.to_json() if arguments.json else result.render())
