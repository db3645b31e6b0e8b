"""Arguments that select several adapters and a method to combine them."""

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
    """Adds --weights, --combine and the options of combination methods."""
    parser.add_argument(
        "--weights",
        metavar="NAME=W,…",
        help="adapters to combine and their weights (default: all, with weight 1)",
    )
    parser.add_argument(
        "--combine",
        metavar="METHOD",
        help=f"combination method: {_DEFAULT} (weighted sum, the default), svd, ties, …",
    )
    parser.add_argument(
        "--rank", metavar="N", type=int, help="rank of the result, for svd and …_svd"
    )
    parser.add_argument(
        "--density", metavar="D", type=float, help="fraction of the values that pruning keeps"
    )
    parser.add_argument(
        "--majority",
        metavar="BY",
        type=choice("total", "frequency"),
        help="ties: elect signs by the total of their values or by their frequency",
    )
    parser.add_argument(
        "--drop-seed", metavar="N", type=int, help="dare: random seed for dropping values"
    )


def parse_adapters(entries: Sequence[str]) -> dict[str, str]:
    """Parses entries NAME=DIR; returns the directories by name.

    Raises:
      JaxtuneError: an entry has no name, or two entries have the same name.
    """
    directories: dict[str, str] = {}
    for entry in entries:
        match = _NAMED.fullmatch(entry)
        if match is None:
            raise JaxtuneError(f'--adapter: "{entry}" has no name; use NAME=DIR')
        if match[1] in directories:
            raise JaxtuneError(f'--adapter: duplicate name "{match[1]}"')
        directories[match[1]] = match[2]
    return directories


def is_named(entry: str) -> bool:
    """Returns whether an entry of --adapter is NAME=DIR rather than a directory."""
    return _NAMED.fullmatch(entry) is not None


def has_combination(arguments: argparse.Namespace) -> bool:
    """Returns whether any of the arguments of `add_combination` is given."""
    return any(value is not None for value in _combination_flags(arguments).values())


def parse_weights(text: str | None, names: Sequence[str]) -> dict[str, float]:
    """Parses --weights; without it every named adapter has weight 1.

    Raises:
      JaxtuneError: an unknown or duplicate name, or a weight that is not a number.
    """
    if text is None:
        return dict.fromkeys(names, 1.0)
    weights: dict[str, float] = {}
    for entry in text.split(","):
        name, _, number = entry.strip().partition("=")
        lookup(dict.fromkeys(names), name, "--weights")
        if name in weights:
            raise JaxtuneError(f'--weights: duplicate name "{name}"')
        try:
            weights[name] = float(number)
        except ValueError:
            raise JaxtuneError(
                f'--weights: "{entry.strip()}" is not of the form NAME=WEIGHT, e.g. {name}=0.5'
            ) from None
    return weights


def parse_method(arguments: argparse.Namespace) -> tuple[str, Options]:
    """Returns the name of a method of `jaxtune.adapter_files.combine`, and its options.

    Raises:
      JaxtuneError: an unknown method, or an option that the method does not use.
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
            raise JaxtuneError(f"--combine={method} does not use {flag} (used by: {others})")
    return method, Options(**{fields[flag]: value for flag, value in options.items()})


# Fields of `Options` by flag, where the names differ: --seed is the sampling seed of `generate`.
_FIELDS = {"--drop-seed": "seed"}


def _combination_flags(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Returns the arguments of `add_combination` by flag; None where a flag is not given."""
    return {
        "--weights": arguments.weights,
        "--combine": arguments.combine,
        "--rank": arguments.rank,
        "--density": arguments.density,
        "--majority": arguments.majority,
        "--drop-seed": arguments.drop_seed,
    }
