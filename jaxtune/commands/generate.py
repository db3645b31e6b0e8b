"""`jaxtune generate`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from jaxtune.commands.arguments import ADAPTER_HELP
from jaxtune.commands.combination import (
    add_combination,
    has_combination,
    is_named,
    parse_adapters,
    parse_method,
    parse_weights,
)
from jaxtune.commands.processes import add_processes, joined
from jaxtune.errors import JaxtuneError

if TYPE_CHECKING:
    import jaxtune
    from jaxtune.api.prompts import TextOptions

SUMMARY = "Generate answers to prompts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", metavar="DIR", help="directory of a run")
    model.add_argument("--model", metavar="PATH", help="Hugging Face directory, hub id or .gguf")
    parser.add_argument(
        "--adapter",
        metavar="WHICH",
        action="append",
        help=f"{ADAPTER_HELP}; with --model: PEFT directory or NAME=DIR (repeat for several)",
    )
    add_combination(parser)
    parser.add_argument(
        "--base-only", action="store_true", help="use the base model without the adapter"
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        required=True,
        help="user message; repeat for several",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before each prompt")
    parser.add_argument(
        "--chat-template",
        metavar="TEMPLATE",
        default="",
        help="Jinja file or name of a built-in template, instead of the template of the run, the "
        "adapter or the checkpoint",
    )
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as plain text, without a template"
    )
    _add_decoding(parser)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments that control length, sampling, end and output of answers."""
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=128,
        help="maximum number of tokens to generate (default: 128)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="sampling temperature; 0 (default) decodes greedily",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        default=1.0,
        help="nucleus sampling: cumulative probability of the tokens to sample from (default: 1)",
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=int,
        default=0,
        help="number of most likely tokens to sample from (default: 0, all tokens)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="random seed of sampling (default: 0)"
    )
    parser.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="text that ends an answer and is not part of it; repeat for several",
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer while it is generated (default: if it is the only one and goes to "
        "a terminal)",
    )
    parser.add_argument(
        "--special-tokens", action="store_true", help="print the special tokens of the answers"
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    with joined(arguments):
        _generate(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    """Generates the answers, which process 0 prints."""
    import jax

    for flag in ("system", "chat_template"):
        if arguments.raw and getattr(arguments, flag):
            name = flag.replace("_", "-")
            raise JaxtuneError(
                f"jaxtune generate: --{name} needs a chat template and cannot be used with --raw"
            )
    alone = len(arguments.prompt) == 1
    if arguments.stream and not alone:
        raise JaxtuneError("jaxtune generate: --stream takes a single --prompt")
    model = _load_model(arguments)
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    prompts = [
        prompt if arguments.raw else [*system, {"role": "user", "content": prompt}]
        for prompt in arguments.prompt
    ]
    length, temperature = arguments.max_new_tokens, arguments.temperature
    options: TextOptions = {
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "stop": arguments.stop,
        "skip_special_tokens": not arguments.special_tokens,
    }
    # The processes of a run have different outputs but must make the same calls.
    terminal = alone and jax.process_count() == 1 and sys.stdout.isatty()
    if terminal if arguments.stream is None else arguments.stream:
        for piece in model.generate(prompts[0], length, temperature, stream=True, **options):
            _write(piece)
        _write("\n")
        return
    answers = model.generate(prompts, length, temperature, **options)
    for prompt, answer in zip(arguments.prompt, answers, strict=True):
        _write(f"{answer}\n" if alone else f">>> {prompt}\n{answer}\n")


def _write(text: str) -> None:
    """Prints text at once, in the process that leads."""
    from jaxtune.parallel.processes import leads

    if leads():
        print(text, end="", flush=True)


def _load_model(arguments: argparse.Namespace) -> jaxtune.Model:
    """Loads the model with the requested adapters and chat template."""
    import jaxtune

    template = arguments.chat_template
    entries: list[str] = [] if arguments.base_only else arguments.adapter or []
    names = [entry for entry in entries if is_named(entry)]
    if has_combination(arguments) and (arguments.workdir or not names):
        raise JaxtuneError(
            "jaxtune generate: combining adapters requires --model and an --adapter NAME=DIR for "
            "each"
        )
    if arguments.workdir:
        if len(entries) > 1:
            raise JaxtuneError("jaxtune generate: --workdir takes a single --adapter")
        run = jaxtune.Run(arguments.workdir)
        which = "none" if arguments.base_only else (entries or ["best"])[0]
        return run.model(which, chat_template=template)
    if len(entries) <= 1 and not names:
        adapter = entries[0] if entries else None
        return jaxtune.load(arguments.model, adapter=adapter, chat_template=template)
    directories = parse_adapters(entries)
    weights = parse_weights(arguments.weights, list(directories))
    method, options = parse_method(arguments)
    chosen = {name: directories[name] for name in weights}
    model = jaxtune.load(arguments.model, adapters=chosen, chat_template=template)
    # A single adapter without a weight is used as it is, so it may be of any method.
    alone = len(chosen) == 1 and not has_combination(arguments)
    choice = next(iter(chosen)) if alone else weights
    return model.use(choice, method, **dataclasses.asdict(options))
