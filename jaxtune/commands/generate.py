"""`jaxtune generate`."""

from __future__ import annotations

import argparse
from typing import Any

from jaxtune.commands.arguments import ADAPTER_HELP

SUMMARY = "Answer prompts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", metavar="DIR", help="the run whose model answers")
    model.add_argument("--model", metavar="PATH", help="a Hugging Face directory, hub id or .gguf")
    parser.add_argument(
        "--adapter", metavar="WHICH", help=f"{ADAPTER_HELP}; with --model: a PEFT directory"
    )
    parser.add_argument("--base-only", action="store_true", help="leave the adapter out")
    parser.add_argument(
        "--prompt", metavar="TEXT", action="append", required=True, help="repeat it for several"
    )
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=128)
    parser.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", metavar="P", type=float, default=1.0)
    parser.add_argument("--seed", metavar="N", type=int, default=0)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
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
