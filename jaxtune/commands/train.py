"""`jaxtune train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jaxtune.commands.arguments import CONFIG_HELP, add_config, add_workdir
from jaxtune.commands.processes import add_processes, joined
from jaxtune.config import Config, load_file, resolve

SUMMARY = "Start or resume a training run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config(parser, help=f"{CONFIG_HELP}; not needed to resume a run")
    add_workdir(parser)
    parser.add_argument(
        "--accept-changes",
        metavar="KEY[,KEY…]",
        default="",
        help="resume although these have changed since the run was last started: options such as "
        "optimizer.learning_rate, model (the files of the base), tokenizer, data.train, data.eval, "
        "chat, config or record; the history of the run lists them",
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.training.train import train

    with joined(arguments, saves_on_sigterm=True) as leads:
        keys = [key.strip() for key in arguments.accept_changes.split(",") if key.strip()]
        directory = train(_config(arguments, keys), arguments.workdir, accept_changes=keys)
        if leads:
            print(f"done: {directory.steps_done()} steps, results in {directory.path}")


def _config(arguments: argparse.Namespace, accepted: Sequence[str]) -> Config | None:
    """Returns the config of a new run; without --config, that of the existing run with overrides,
    or None to resume it unchanged."""
    from jaxtune.runs.directory import RunDirectory
    from jaxtune.runs.resuming import last_config

    if arguments.config:
        return resolve(load_file(arguments.config), arguments.overrides)
    if arguments.overrides:
        config = last_config(RunDirectory(arguments.workdir), accepted)
        return resolve(config, arguments.overrides)
    return None
