"""`jaxtune quickstart`."""

from __future__ import annotations

import argparse

from jaxtune.commands.arguments import CONFIG_HELP, add_config

SUMMARY = "Fine-tune a small model and compare it with its base."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    default = "configs/quickstart.py"
    add_config(parser, default=default, help=f"{CONFIG_HELP} (default: {default})")
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        default="runs/quickstart",
        help="directory of the run (default: runs/quickstart)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.config import load_file, resolve
    from jaxtune.demos.quickstart import quickstart
    from jaxtune.parallel import processes

    config = resolve(load_file(arguments.config), arguments.overrides)
    if arguments.owns_process:
        processes.initialize(None)  # SIGTERM then saves a step of the training
    quickstart(config, arguments.workdir)
