"""`jaxtune train`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os

from jaxtune.commands.arguments import CONFIG_HELP, add_config, add_workdir
from jaxtune.config import Config, load_file, resolve
from jaxtune.errors import user_message

SUMMARY = "Start or resume a training run."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_config(parser, help=f"{CONFIG_HELP}; not needed to resume a run")
    add_workdir(parser)
    several = parser.add_argument_group(
        "multi-process training",
        "detected on Cloud TPU, SLURM and Open MPI; elsewhere set these options or "
        "JAXTUNE_COORDINATOR, JAXTUNE_PROCESSES and JAXTUNE_PROCESS",
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address at which process 0 listens"
    )
    several.add_argument("--processes", metavar="N", type=int, help="number of processes")
    several.add_argument("--process", metavar="I", type=int, help="index of this process, from 0")
    several.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=int,
        default=100,
        help="stop all processes if one sends no heartbeat for this long (default: 100)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from jaxtune.parallel import failures, processes
    from jaxtune.training.train import train

    addresses = processes.find_addresses(
        arguments.coordinator, arguments.processes, arguments.process, os.environ
    )
    shared_failures = contextlib.nullcontext()
    if arguments.owns_process:
        processes.initialize(addresses, arguments.heartbeat)
        if not processes.leads():
            logging.getLogger("jaxtune").setLevel(logging.WARNING)  # process 0 logs for all
        shared_failures = failures.shared(user_message)
    with shared_failures:
        directory = train(_config(arguments), arguments.workdir)
        if processes.leads():
            print(f"done: {directory.steps_done()} steps, results in {directory.path}")


def _config(arguments: argparse.Namespace) -> Config | None:
    """Returns the config of a new run; without --config, that of the existing run with overrides,
    or None to resume it unchanged."""
    from jaxtune.api.run import Run

    if arguments.config:
        return resolve(load_file(arguments.config), arguments.overrides)
    if arguments.overrides:
        return resolve(Run(arguments.workdir).config, arguments.overrides)
    return None
