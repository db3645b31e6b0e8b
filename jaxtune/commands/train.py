"""`jaxtune train`."""

from __future__ import annotations

import argparse

from jaxtune.commands.arguments import CONFIG_HELP, add_config, add_workdir

SUMMARY = "Train, or go on with the run in a directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config(parser, help=f"{CONFIG_HELP}; without it a run goes on")
    add_workdir(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    import jaxtune
    from jaxtune.config import load_file, resolve

    config = None
    if arguments.config:
        config = resolve(load_file(arguments.config), arguments.overrides)
    elif arguments.overrides:
        config = resolve(jaxtune.Run(arguments.workdir).config, arguments.overrides)
    run = jaxtune.train(config, arguments.workdir)
    print(f"done: {run.directory.steps_done()} steps, everything is in {run.path}")
