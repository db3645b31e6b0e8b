"""Options of commands that several processes run together, and joining these processes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator

from jaxtune.errors import user_message


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the other processes."""
    several = parser.add_argument_group(
        "several processes",
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


@contextlib.contextmanager
def joined(arguments: argparse.Namespace, *, saves_on_sigterm: bool = False) -> Iterator[bool]:
    """Joins the other processes; within the block an error of one process ends all of them.

    Args:
      arguments: parsed arguments of a command with the options of `add_processes`.
      saves_on_sigterm: whether the command takes steps, after which it looks for SIGTERM;
        otherwise, and before the first step, the signal ends all processes.

    Yields:
      Whether this process prints the results: true for process 0.
    """
    from jaxtune.parallel import failures, processes, termination

    addresses = processes.find_addresses(
        arguments.coordinator, arguments.processes, arguments.process, os.environ
    )
    if not arguments.owns_process:
        yield processes.leads()
        return
    termination.end_by(failures.fail)
    processes.initialize(addresses, arguments.heartbeat, notices=saves_on_sigterm)
    if not processes.leads():
        logging.getLogger("jaxtune").setLevel(logging.WARNING)  # process 0 logs for all
    with failures.shared(user_message):
        yield processes.leads()
