"""What several commands take, and how they report a mistake in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtune.errors import JaxtuneError, closest

CONFIG_HELP = "a Python file with get_config(); --config.section.key=value changes one key"
ADAPTER_HELP = "which adapter of the run: best (by evaluation.stop_metric, the default) or last"


def choice(*choices: str) -> Callable[[str], str]:
    """Returns the type of an argument that takes one of some words."""

    def check(value: str) -> str:
        if value not in choices:
            known = ", ".join(choices)
            raise argparse.ArgumentTypeError(
                f'"{value}" is unknown{closest(value, choices)} (known: {known})'
            )
        return value

    return check


def check_unused(directory: str) -> None:
    """Refuses a taken name at once, rather than after the model has been loaded."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise JaxtuneError(f"{path}: exists already; remove it or choose another place")


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir, which names a run."""
    parser.add_argument("--workdir", metavar="DIR", required=True, help="the run's directory")


def add_config(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Adds --config, which names a config file."""
    parser.add_argument("--config", metavar="FILE", **{"help": CONFIG_HELP, **options})


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter, which chooses among those of a run."""
    parser.add_argument(
        "--adapter",
        type=choice("best", "last"),
        default="best",
        metavar="WHICH",
        help=ADAPTER_HELP,
    )
