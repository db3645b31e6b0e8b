"""`jaxtune export`."""

from __future__ import annotations

import argparse

from jaxtune.atomic_files import refuse_taken
from jaxtune.commands.arguments import add_adapter, add_workdir, choice
from jaxtune.commands.processes import add_processes, joined
from jaxtune.errors import JaxtuneError

SUMMARY = "Export the model or adapter of a run for other tools."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_workdir(parser)
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        type=choice("peft", "vllm", "merged"),
        required=True,
        help="peft (the adapter), vllm (a LoRA adapter that vLLM can load) or merged (a Hugging "
        "Face checkpoint)",
    )
    parser.add_argument("--to", metavar="DIR", required=True, help="output directory")
    add_adapter(parser)
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="merged: quantize to the format of the base (quantize.format) and report the error",
    )
    add_processes(parser)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    import jaxtune
    from jaxtune.checkpoints.requantize import print_report

    if arguments.quantized and arguments.format != "merged":
        raise JaxtuneError("--quantized requires --format merged: adapters are not quantized")
    with joined(arguments) as leads:
        if leads:  # an error ends the other processes, too
            refuse_taken(arguments.to)
        run = jaxtune.Run(arguments.workdir)
        if arguments.format == "merged":
            quantized = arguments.quantized
            written = run.save_merged(arguments.to, arguments.adapter, quantized=quantized)
        else:
            written = run.save_adapter(arguments.to, arguments.adapter, target=arguments.format)
        if leads:
            print_report(written)
            print(f"written: {written}")
