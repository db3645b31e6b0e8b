"""`jaxtune config`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from jaxtune.config import OPTIONS
from jaxtune.config.effect import readers_of, text
from jaxtune.config.option import Option, number
from jaxtune.config.tree import SECTIONS
from jaxtune.errors import JaxtuneError, closest

SUMMARY = "List the options of a config with defaults and choices."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        default="",
        help="section or option to list, such as adapter or adapter.rank; default: all",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    keys = _selected(arguments.name)
    if arguments.json:
        print(json.dumps({key: _as_json(key) for key in keys}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        _print_sections(console, keys)
        return
    for key in keys:
        print(f"{key}={text(OPTIONS[key].default)}  {'; '.join(_description(key))}")


def _selected(name: str) -> list[str]:
    """Returns the keys of a section, an option, or everything.

    Raises:
      JaxtuneError: an unknown name.
    """
    name = name.removeprefix("--").removeprefix("config.")
    if name in OPTIONS:
        return [name]
    keys = [key for key in OPTIONS if not name or key.partition(".")[0] == name]
    # The name of an option without its section.
    keys = keys or [key for key in OPTIONS if key.partition(".")[2] == name]
    if not keys:
        raise JaxtuneError(
            f'unknown config section or key "{name}"{closest(name, [*SECTIONS, *OPTIONS])} '
            f"(sections: {', '.join(SECTIONS)})"
        )
    return keys


def _print_sections(console: Any, keys: Sequence[str]) -> None:
    """Prints the options with colours and indentation, grouped by section."""
    from rich.padding import Padding
    from rich.text import Text

    shown = ""
    for key in keys:
        section, _, name = key.partition(".")
        if section != shown:
            what = (
                (type(SECTIONS[section]).__doc__ or "")
                .splitlines()[0]
                .partition(": ")[2]
                .rstrip(".")
            )
            heading = Text(section, "bold underline") + Text(f"  {what}" if what else "")
            console.print(Text("\n") + heading if shown else heading)
            shown = section
        default = text(OPTIONS[key].default)
        console.print(Text.assemble("  ", (f"{name}", "bold cyan"), "=", (default, "green")))
        for line in _description(key):
            console.print(Padding(Text(line), (0, 0, 0, 6)))
    how = (
        "In a config file: c.SECTION.NAME = VALUE. On the command line: --config.SECTION.NAME=VALUE"
    )
    console.print(Text(f"\n{how}"))


def _description(key: str) -> list[str]:
    """Returns the help of an option, its valid values and the choices that read it."""
    option = OPTIONS[key]
    lines = [option.help]
    if option.choices:
        lines.append(f"choices: {', '.join(choice or '(empty)' for choice in option.choices)}")
    else:
        limits = [f"at least {number(option.minimum)}"] if option.minimum is not None else []
        limits = [f"{option.minimum} or at least 1"] if option.nonzero else limits
        limits = limits if option.least is None else [f"0 or at least {number(option.least)}"]
        limits += [f"at most {number(option.maximum)}"] if option.maximum is not None else []
        lines.append(", ".join([_kind(option), *limits]))
    for selector, choices in readers_of(key).items():
        lines.append(f"read with {selector}: {', '.join(choices)}")
    return lines


def _kind(option: Option) -> str:
    if option.names:
        return "names, separated by commas"
    if option.json:
        return "JSON object"
    if option.interval:
        return "number of steps, or an interval such as 0.5 epochs"
    if option.share:
        return "whole number, or a share below 1"
    kinds = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return kinds[type(option.default)]


def _as_json(key: str) -> dict[str, Any]:
    option = OPTIONS[key]
    return {
        "default": option.default,
        "help": option.help,
        "type": _kind(option),
        "choices": list(option.choices),
        "minimum": option.minimum,
        "maximum": option.maximum,
        "nonzero": option.nonzero,
        "least": option.least,
        "read_with": {selector: list(names) for selector, names in readers_of(key).items()},
    }
