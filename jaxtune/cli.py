"""The command line: arguments only; the work is done elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from jaxtune.errors import JaxtuneError, closest

# Nothing that imports jax is imported up here: it takes seconds, and --help should not.

OVERRIDE = "--config."
USER_ERROR, INTERRUPTED = 65, 130


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as every other part of jaxtune does."""

    def error(self, message: str) -> NoReturn:
        raise JaxtuneError(f"{self.prog}: {message}")


def _choice(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            known = ", ".join(choices)
            raise argparse.ArgumentTypeError(
                f'"{value}" is unknown{closest(value, choices)} (known: {known})'
            )
        return value

    return check


def _train(arguments: argparse.Namespace) -> None:
    import jaxtune
    from jaxtune.config import load_file, resolve

    config = None
    if arguments.config:
        config = resolve(load_file(arguments.config), arguments.overrides)
    elif arguments.overrides:
        config = resolve(jaxtune.Run(arguments.workdir).config, arguments.overrides)
    run = jaxtune.train(config, arguments.workdir)
    print(f"done: {run.config.training.steps} steps, everything is in {run.path}")


def _eval(arguments: argparse.Namespace) -> None:
    from jaxtune.training.evaluate import evaluate
    from jaxtune.training.run import RunDirectory

    adapter = "none" if arguments.base_only else arguments.adapter
    scores = evaluate(RunDirectory(arguments.workdir), adapter, arguments.data)
    if arguments.json:
        print(json.dumps(scores))
        return
    print(f"loss            {scores['loss']:.4f}")
    print(f"perplexity      {scores['perplexity']:.4f}")
    print(f"token accuracy  {scores['token_accuracy']:.2%}")
    print(f"target tokens   {scores['tokens']:,.0f}")


def _generate(arguments: argparse.Namespace) -> None:
    import jaxtune
    from jaxtune.data import encode_prompt

    template = ""
    if arguments.workdir:
        run = jaxtune.Run(arguments.workdir)
        template = run.config.data.chat_template
        model = run.model("none" if arguments.base_only else arguments.adapter or "best")
    else:
        adapter = None if arguments.base_only else arguments.adapter or None
        model = jaxtune.load(arguments.model, adapter=adapter)
    prompts: list[Any] = arguments.prompt
    if not arguments.raw:
        chats = [[{"role": "user", "content": prompt}] for prompt in arguments.prompt]
        prompts = [encode_prompt(model.tokenizer, chat, template) for chat in chats]
    answers = model.generate(
        prompts,
        arguments.max_new_tokens,
        arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    for prompt, answer in zip(arguments.prompt, answers, strict=True):
        if len(answers) > 1:
            print(f">>> {prompt}")
        print(answer)


def _export(arguments: argparse.Namespace) -> None:
    import jaxtune
    from jaxtune.checkpoints.peft import read_adapter, write_adapter

    _check_free(arguments.to)
    run = jaxtune.Run(arguments.workdir)
    if arguments.format == "peft":
        written = write_adapter(
            arguments.to, read_adapter(run.adapter_directory(arguments.adapter), encoder=True)
        )
    else:
        written = run.model(arguments.adapter).save_pretrained(arguments.to)
    print(f"written: {written}")


def _convert(arguments: argparse.Namespace) -> None:
    import jaxtune

    _check_free(arguments.to)
    quantize = arguments.quantize or None
    written = jaxtune.convert(arguments.source, arguments.to, quantize, arguments.dtype)
    print(f"written: {written}")


def _plan(arguments: argparse.Namespace) -> None:
    from jaxtune.config import load_file, resolve
    from jaxtune.planning.plan import plan

    result = plan(resolve(load_file(arguments.config), arguments.overrides), arguments.topology)
    print(result.to_json() if arguments.json else result.render())


def _experts(arguments: argparse.Namespace) -> None:
    from jaxtune.config import load_file, resolve
    from jaxtune.training.expert_scores import summarize
    from jaxtune.training.train import score_training_data

    path = Path(arguments.to)
    if path.exists():
        raise JaxtuneError(f"{path}: exists already; remove it or choose another place")
    config = resolve(load_file(arguments.config), arguments.overrides)
    scores = score_training_data(config)
    print(summarize(scores, config.adapter))
    path.write_text(scores.to_json(), encoding="utf-8")
    print(f"written: {path}")


def _quickstart(arguments: argparse.Namespace) -> None:
    from jaxtune.config import load_file, resolve
    from jaxtune.quickstart import quickstart

    quickstart(resolve(load_file(arguments.config), arguments.overrides), arguments.workdir)


def _check_free(directory: str) -> None:
    """Refuses a taken name at once, rather than after the model has been loaded."""
    path = Path(directory)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise JaxtuneError(f"{path}: exists already; remove it or choose another place")


def _parser() -> tuple[_Parser, dict[str, _Parser]]:
    """Returns the parser, and those of its commands by name."""
    parser = _Parser("jaxtune", description="Fine-tune DeepSeek models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxtune {version('jaxtune')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, _Parser] = {}

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str) -> _Parser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(run=run)
        parsers[name] = added
        return added

    config_help = "a Python file with get_config(); --config.section.key=value changes one key"
    adapter_help = "which adapter of the run: best (lowest held-out loss, the default) or last"
    which = {"type": _choice("best", "last"), "default": "best", "metavar": "WHICH"}

    train = command("train", _train, "Train, or go on with the run in a directory.")
    train.add_argument("--config", metavar="FILE", help=f"{config_help}; without it a run goes on")
    train.add_argument("--workdir", metavar="DIR", required=True, help="the run's directory")

    evaluate = command("eval", _eval, "Print the scores of a run on held-out examples.")
    evaluate.add_argument("--workdir", metavar="DIR", required=True, help="the run's directory")
    evaluate.add_argument("--data", metavar="FILE", default="", help="instead of data.eval")
    evaluate.add_argument("--adapter", **which, help=adapter_help)
    evaluate.add_argument("--base-only", action="store_true", help="score the base model")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    generate = command("generate", _generate, "Answer prompts.")
    model = generate.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", metavar="DIR", help="the run whose model answers")
    model.add_argument("--model", metavar="PATH", help="a Hugging Face directory, hub id or .gguf")
    generate.add_argument(
        "--adapter", metavar="WHICH", help=f"{adapter_help}; with --model: a PEFT directory"
    )
    generate.add_argument("--base-only", action="store_true", help="leave the adapter out")
    generate.add_argument(
        "--prompt", metavar="TEXT", action="append", required=True, help="repeat it for several"
    )
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    generate.add_argument("--max-new-tokens", metavar="N", type=int, default=128)
    generate.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: greedy")
    generate.add_argument("--top-p", metavar="P", type=float, default=1.0)
    generate.add_argument("--seed", metavar="N", type=int, default=0)

    export = command("export", _export, "Write what a run trained for other tools to load.")
    export.add_argument("--workdir", metavar="DIR", required=True, help="the run's directory")
    export.add_argument(
        "--format",
        metavar="FORMAT",
        type=_choice("peft", "merged"),
        required=True,
        help="peft (the adapter) or merged (a Hugging Face checkpoint)",
    )
    export.add_argument("--to", metavar="DIR", required=True, help="directory to create")
    export.add_argument("--adapter", **which, help=adapter_help)

    convert = command("convert", _convert, "Write a checkpoint as a Hugging Face directory.")
    convert.add_argument(
        "--from", dest="source", metavar="PATH", required=True, help="a .gguf file, directory or id"
    )
    convert.add_argument("--to", metavar="DIR", required=True, help="directory to create")
    convert.add_argument(
        "--dtype",
        metavar="DTYPE",
        type=_choice("bfloat16", "float32"),
        default="bfloat16",
        help="of the weights that are not quantized",
    )
    convert.add_argument(
        "--quantize",
        metavar="FORMAT",
        type=_choice("nf4", "int4", "int8", "fp8"),
        help="write the linear weights in nf4, int4, int8 or fp8",
    )

    plan = command("plan", _plan, "Say what a run would need, before it starts.")
    plan.add_argument("--config", metavar="FILE", required=True, help=config_help)
    plan.add_argument(
        "--topology", metavar="CHIPS", default="cpu", help="cpu (the default), v5e:1x1, v5p:2x2x1 …"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")

    experts = command("experts", _experts, "Score routed experts on training data, for ESFT.")
    experts.add_argument("action", type=_choice("score"), metavar="score", help="what to do")
    experts.add_argument("--config", metavar="FILE", required=True, help=config_help)
    experts.add_argument("--to", metavar="FILE", required=True, help="file to write")

    quickstart = command("quickstart", _quickstart, "Train a small model; show what it learned.")
    quickstart.add_argument(
        "--config", metavar="FILE", default="configs/quickstart.py", help=config_help
    )
    quickstart.add_argument("--workdir", metavar="DIR", default="runs/quickstart")
    return parser, parsers


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser, parsers = _parser()
    for name in argv[:1]:
        if not name.startswith("-") and name not in parsers:
            known = ", ".join(parsers)
            raise JaxtuneError(f'"{name}" is no command{closest(name, parsers)} (known: {known})')
    rest, overrides = _split_overrides(argv)
    if rest and rest[0] in parsers:
        _check_flags(parsers[rest[0]], rest[1:])
    arguments = parser.parse_args(rest)
    if overrides and "config" not in arguments:
        raise JaxtuneError(f"jaxtune {arguments.command}: takes no {OVERRIDE}{overrides[0]}")
    arguments.overrides = overrides
    return arguments


def _check_flags(command: _Parser, arguments: Sequence[str]) -> None:
    """Refuses unknown flags first, or a misspelt one would be reported as a missing one."""
    known = re.findall(r"--[\w-]+", command.format_help())
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise JaxtuneError(f'{command.prog}: unknown argument "{flag}"{closest(flag, known)}')


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes ``--config.key=value`` and ``--config.key value`` out of the arguments."""
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


class _Stderr(logging.StreamHandler):
    """Writes to whatever sys.stderr is at the time: a progress bar puts its own in place."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


class _Formatter(logging.Formatter):
    """Shows the level of what is more than information."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def set_up_process() -> None:
    """Sets up logging and the compilation cache, as every command of jaxtune needs them."""
    handler = _Stderr()
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("jaxtune").setLevel(logging.INFO)
    # transformers is used for its tokenizers, and would warn that its models need torch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Read by jax when it is imported. The second run of a config then starts at once.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the process with one line and an exit code where the user can mend what went wrong.

    Raises:
      SystemExit: with 65 after a user's mistake, a full device or a file that cannot be used; with
        130 after an interruption. Anything else is a bug, and passes as it is.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        message = _explain(error)
        if message is None or os.environ.get("JAXTUNE_DEBUG"):
            raise
        print("jaxtune: error:", " ".join(message.split()), file=sys.stderr)
        raise SystemExit(USER_ERROR) from None


def _explain(error: Exception) -> str | None:
    """Returns a line for the user, or None where only a developer can help."""
    if isinstance(error, JaxtuneError):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory: a larger training.accumulation, a smaller data.max_length or "
            f"training.remat=full needs less; {str(error)[:200]}"
        )
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
      argv: the arguments; those of the process by default.
    """
    with one_line_errors():
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        set_up_process()
        arguments.run(arguments)


if __name__ == "__main__":
    main()
