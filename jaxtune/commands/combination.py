"""The arguments that name several adapters and say how they are combined."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtune.commands.arguments import choice
from jaxtune.errors import JaxtuneError, lookup

if TYPE_CHECKING:
    from jaxtune.adapter_files.combine import Options

# A name has no slash, so that a directory with an equals sign can be written as ./DIR.
_NAMED = re.compile(r"([\w.+-]+)=(.+)", re.DOTALL)
_DEFAULT = "cat"


def add_combination(parser: argparse.ArgumentParser) -> None:
    """Adds --weights, --combine and the options of the latter."""
    parser.add_argument(
        "--weights", metavar="NAME=W,…", help="which adapters count, and how much; all 1 by default"
    )
    parser.add_argument(
        "--combine",
        metavar="METHOD",
        help=f"how: {_DEFAULT} (the sum, by default), svd, ties, …",
    )
    parser.add_argument("--rank", metavar="N", type=int, help="of the result, with svd and …_svd")
    parser.add_argument(
        "--density", metavar="D", type=float, help="the share of values that pruning keeps"
    )
    parser.add_argument(
        "--majority",
        metavar="BY",
        type=choice("total", "frequency"),
        help="ties: a sign prevails by the total of its values or by their frequency",
    )
    parser.add_argument(
        "--drop-seed", metavar="N", type=int, help="dare: of what is dropped at random"
    )


def parse_adapters(entries: Sequence[str]) -> dict[str, str]:
    """Returns directories by name from entries NAME=DIR.

    Raises:
      JaxtuneError: an entry without a name, or a name that is given twice.
    """
    directories: dict[str, str] = {}
    for entry in entries:
        match = _NAMED.fullmatch(entry)
        if match is None:
            raise JaxtuneError(f'--adapter: "{entry}" has no name: write it as NAME=DIR')
        if match[1] in directories:
            raise JaxtuneError(f'--adapter: "{match[1]}" is given twice')
        directories[match[1]] = match[2]
    return directories


def is_named(entry: str) -> bool:
    """Says whether an entry of --adapter is NAME=DIR rather than a directory."""
    return _NAMED.fullmatch(entry) is not None


def has_combination(arguments: argparse.Namespace) -> bool:
    """Says whether any argument is given that says how adapters are combined."""
    return any(value is not None for value in _combination_flags(arguments).values())


def parse_weights(text: str | None, names: Sequence[str]) -> dict[str, float]:
    """Reads --weights; by default all of the named adapters weigh 1.

    Raises:
      JaxtuneError: an unknown name, one that is given twice, or a weight that is no number.
    """
    if text is None:
        return dict.fromkeys(names, 1.0)
    weights: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = entry.strip().partition("=")
        lookup(dict.fromkeys(names), name, "--weights")
        if name in weights:
            raise JaxtuneError(f'--weights: "{name}" is given twice')
        try:
            weights[name] = float(number)
        except ValueError:
            raise JaxtuneError(
                f'--weights: "{entry.strip()}" is not a name and its weight, such as {name}=0.5'
            ) from None
    return weights


def parse_method(arguments: argparse.Namespace) -> tuple[str, Options]:
    """Returns the way of `jaxtune.adapter_files.combine` to combine adapters, and its options.

    Raises:
      JaxtuneError: an unknown way, or an option that makes no difference to it.
    """
    from jaxtune.adapter_files.combine import COMBINATIONS, Options

    method = _DEFAULT if arguments.combine is None else arguments.combine
    reads = lookup(COMBINATIONS, method, "--combine").reads
    options = {
        flag: value
        for flag, value in _combination_flags(arguments).items()
        if flag not in ("--weights", "--combine") and value is not None
    }
    fields = {flag: _FIELDS.get(flag, flag.removeprefix("--")) for flag in options}
    for flag, field in fields.items():
        if field not in reads:
            others = ", ".join(name for name, way in COMBINATIONS.items() if field in way.reads)
            raise JaxtuneError(f"{flag} means nothing to --combine={method} (it does to {others})")
    return method, Options(**{fields[flag]: value for flag, value in options.items()})


# `generate` has a --seed of its own.
_FIELDS = {"--drop-seed": "seed"}


def _combination_flags(arguments: argparse.Namespace) -> Mapping[str, Any]:
    return {
        "--weights": arguments.weights,
        "--combine": arguments.combine,
        "--rank": arguments.rank,
        "--density": arguments.density,
        "--majority": arguments.majority,
        "--drop-seed": arguments.drop_seed,
    }
