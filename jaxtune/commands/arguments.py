"""Arguments that several commands share, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from jaxtune.errors import closest

CONFIG_HELP = (
    "Python file with get_config(); --config.section.key=value overrides a key (jaxtune config "
    "lists them)"
)
ADAPTER_HELP = "adapter of the run: best (by evaluation.stop_metric, the default) or last"


def choice(*choices: str) -> Callable[[str], str]:
    """Returns an argparse type that accepts one of `choices`."""

    def check(value: str) -> str:
        if value not in choices:
            known = ", ".join(choices)
            raise argparse.ArgumentTypeError(
                f'invalid choice "{value}"{closest(value, choices)} (choose from: {known})'
            )
        return value

    return check


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir, the directory of a run."""
    parser.add_argument("--workdir", metavar="DIR", required=True, help="directory of the run")


def add_config(
    parser: argparse.ArgumentParser,
    *,
    required: bool = False,
    default: str | None = None,
    help: str = CONFIG_HELP,
) -> None:
    """Adds --config, a config file."""
    parser.add_argument("--config", metavar="FILE", required=required, default=default, help=help)


def add_adapter(parser: argparse.ArgumentParser) -> None:
    """Adds --adapter, which selects an adapter of a run."""
    parser.add_argument(
        "--adapter",
        type=choice("best", "last"),
        default="best",
        metavar="WHICH",
        help=ADAPTER_HELP,
    )
