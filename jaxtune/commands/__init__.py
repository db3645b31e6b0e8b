"""The commands of `jaxtune`, one module each; see `Command` for their interface.

The modules import jax inside functions only: the import takes seconds, and --help should be fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Protocol

from jaxtune.commands import (
    combine,
    config,
    convert,
    data,
    eval,
    experts,
    export,
    generate,
    plan,
    quickstart,
    train,
)


class Command(Protocol):
    """The interface of a command, implemented by a module."""

    @property
    def SUMMARY(self) -> str:
        """One-line description for --help."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the command's arguments."""

    def run(self, arguments: argparse.Namespace) -> None:
        """Runs the command."""


COMMANDS: Mapping[str, Command] = {
    "train": train,
    "config": config,
    "data": data,
    "eval": eval,
    "generate": generate,
    "export": export,
    "combine": combine,
    "convert": convert,
    "plan": plan,
    "experts": experts,
    "quickstart": quickstart,
}
