"""`jaxtune export`."""

from __future__ import annotations

import argparse

from jaxtune.commands.arguments import add_adapter, add_workdir, check_free, choice

SUMMARY = "Write what a run trained for other tools to load."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_workdir(parser)
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        type=choice("peft", "vllm", "merged"),
        required=True,
        help="peft (the adapter), vllm (a LoRA adapter as vLLM loads it) or merged (a Hugging Face "
        "checkpoint)",
    )
    parser.add_argument("--to", metavar="DIR", required=True, help="directory to create")
    add_adapter(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    import jaxtune
    from jaxtune.checkpoints.peft import write_adapter

    check_free(arguments.to)
    run = jaxtune.Run(arguments.workdir)
    if arguments.format == "merged":
        written = run.model(arguments.adapter).save_pretrained(arguments.to)
    else:
        written = write_adapter(arguments.to, run.adapter(arguments.adapter, arguments.format))
    print(f"written: {written}")
