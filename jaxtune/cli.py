"""The command line: parses arguments, sets up the process and runs a command."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from jaxtune.commands import COMMANDS
from jaxtune.config import OPTIONS
from jaxtune.errors import JaxtuneError, Retry, closest, user_message
from jaxtune.log_output import StderrHandler, enable_logging
from jaxtune.parallel import termination

OVERRIDE = "--config."
USER_ERROR, INTERRUPTED, READER_ENDED = 65, 130, 141


class _Parser(argparse.ArgumentParser):
    """A parser that raises `JaxtuneError` for wrong arguments, where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        raise JaxtuneError(f"{self.prog}: {message}")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Returns the parser and the parsers of its commands by name."""
    parser = _Parser(
        "jaxtune",
        description="Fine-tune DeepSeek models.",
        epilog="jaxtune COMMAND --help lists the arguments of a command, and jaxtune config the "
        "options of a config.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxtune {version('jaxtune')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, _Parser] = {}
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        parsers[name] = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False
        )
        parsers[name].set_defaults(run=command.run)
        command.add_arguments(parsers[name])
    return parser, parsers


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, parsers = _parser()
    for name in argv[:1]:
        if not name.startswith("-") and name not in parsers:
            known = ", ".join(parsers)
            raise JaxtuneError(f'unknown command "{name}"{closest(name, parsers)} (known: {known})')
    rest, overrides = _split_overrides(argv)
    if rest and rest[0] in parsers:
        _check_flags(parsers[rest[0]], rest[1:])
        _check_positionals(parsers[rest[0]], rest[1:])
    arguments = parser.parse_args(rest)
    if overrides and "config" not in arguments:
        raise JaxtuneError(
            f"jaxtune {arguments.command}: unexpected {OVERRIDE}{overrides[0]}: "
            "this command does not take a config"
        )
    arguments.overrides = overrides
    return arguments


def _check_flags(command: _Parser, arguments: Sequence[str]) -> None:
    """Raises for unknown flags.

    argparse would report a misspelled required flag as missing, without naming the misspelling.
    """
    known = re.findall(r"--[\w-]+", command.format_help())
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            hint = closest(flag, known)
            if flag.removeprefix("--") in OPTIONS and "--config" in known:
                hint = f'; did you mean "{OVERRIDE}{argument.removeprefix("--")}"?'
            raise JaxtuneError(f'{command.prog}: unknown argument "{flag}"{hint}')


def _check_positionals(command: _Parser, arguments: Sequence[str]) -> None:
    """Raises for arguments without a flag, with the flag that was probably meant.

    argparse would report the flags that are missing instead.
    """
    usage = " ".join(command.format_usage().split()).partition(command.prog)[2]
    flags = re.findall(r"(--[\w-]+)( [A-Z])?", usage)
    with_value = {flag for flag, value in flags if value}
    expected = re.sub(r"--[\w-]+( [A-Z][^\s\])]*)?|-h|[\[\]()|]", " ", usage).split()
    found = [
        argument
        for previous, argument in zip(["", *arguments], arguments, strict=False)
        if not argument.startswith("-") and previous not in with_value
    ]
    if len(found) <= len(expected):
        return
    extra, hint = found[len(expected)], ""
    if extra.partition("=")[0] in OPTIONS:
        hint = f'; did you mean "{OVERRIDE}{extra}"?'
    elif Path(extra).suffix in (".py", ".yaml", ".yml", ".json") and "--config" in with_value:
        hint = "; a config is a Python file (.py) and follows --config"
    elif Path(extra).is_dir() and "--workdir" in with_value:
        hint = f'; did you mean "--workdir {extra}"?'
    else:
        hint = closest(f"--{extra}", [flag for flag, _ in flags])
    raise JaxtuneError(f'{command.prog}: unexpected argument "{extra}"{hint}')


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates ``--config.key=value`` and ``--config.key value`` from the other arguments."""
    rest, overrides = [], []
    pending = list(argv)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith(OVERRIDE):
            rest.append(argument)
            continue
        override = argument.removeprefix(OVERRIDE)
        if "=" not in override and pending and not pending[0].startswith("--"):
            override += "=" + pending.pop(0)
        overrides.append(override)
    return rest, overrides


def set_up_process() -> None:
    """Sets up logging and the persistent compilation cache."""
    logging.basicConfig(level=logging.WARNING, handlers=[StderrHandler()])
    enable_logging()
    # Only the tokenizers of transformers are used; it would warn that its models need torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read when jax is imported. With this cache, a second run of a config starts without compiling.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors that a user can fix into one line on standard error and an exit code.

    Raises:
      SystemExit: the code is 65 for a wrong input, a full device or an unusable file, 75 if running
        the same command again resumes the run, 130 after an interruption and 141 if nothing reads
        the output any more. Other exceptions are bugs and propagate unchanged.
    """
    try:
        yield
    except KeyboardInterrupt:
        termination.finish_if_received()
        print("jaxtune: error: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except termination.Terminated:
        termination.finish_if_received()
        raise SystemExit(Retry.exit_code) from None
    except BrokenPipeError:
        # The reader of the output has ended: `jaxtune config | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at exit
        raise SystemExit(READER_ENDED) from None
    except Exception as error:
        termination.finish_if_received()
        message = user_message(error)
        if message is None or os.environ.get("JAXTUNE_DEBUG"):
            raise
        print("jaxtune: error:", " ".join(message.split()), file=sys.stderr)
        raise SystemExit(getattr(error, "exit_code", USER_ERROR)) from None


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
      argv: command-line arguments; by default those of the process.
    """
    with one_line_errors():
        if argv is None:
            termination.install()
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        set_up_process()
        # When called from Python, the command shares the process with other code.
        arguments.owns_process = argv is None
        arguments.run(arguments)


if __name__ == "__main__":
    main()
