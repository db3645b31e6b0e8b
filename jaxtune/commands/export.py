"""`jaxtune export`."""

from __future__ import annotations

import argparse

from jaxtune.commands.arguments import add_adapter, add_workdir, check_unused, choice
from jaxtune.errors import JaxtuneError

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
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="merged: in the format of the base (quantize.format), with a report of what it costs",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    import jaxtune
    from jaxtune.checkpoints.requantize import print_report

    if arguments.quantized and arguments.format != "merged":
        raise JaxtuneError("--quantized goes with --format merged: an adapter has no such format")
    check_unused(arguments.to)
    run = jaxtune.Run(arguments.workdir)
    if arguments.format == "merged":
        written = run.save_merged(arguments.to, arguments.adapter, quantized=arguments.quantized)
        print_report(written)
    else:
        written = run.save_adapter(arguments.to, arguments.adapter, target=arguments.format)
    print(f"written: {written}")
