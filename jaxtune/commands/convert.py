"""`jaxtune convert`."""

from __future__ import annotations

import argparse

from jaxtune.atomic_files import refuse_taken
from jaxtune.commands.arguments import choice
from jaxtune.registry import DTYPES, WEIGHT_FORMATS

SUMMARY = "Convert a checkpoint to a Hugging Face directory."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "--from",
        dest="source",
        metavar="PATH",
        required=True,
        help=".gguf file, checkpoint directory or hub id",
    )
    parser.add_argument("--to", metavar="DIR", required=True, help="output directory")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        type=choice(*DTYPES),
        default="bfloat16",
        help="dtype of the weights that are not quantized (default: bfloat16)",
    )
    parser.add_argument(
        "--quantize",
        metavar="FORMAT",
        type=choice(*WEIGHT_FORMATS),
        help="quantize the linear weights to nf4, int4, int8 or fp8",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="write a separate LM head if the head is tied to the embedding",
    )
    parser.add_argument(
        "--vocab-size",
        metavar="N",
        type=int,
        help="resize embedding and head to N tokens; new rows are the mean of the others",
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    import jaxtune

    refuse_taken(arguments.to)
    written = jaxtune.convert(
        arguments.source,
        arguments.to,
        arguments.quantize or None,
        arguments.dtype,
        untie=arguments.untie,
        vocab_size=arguments.vocab_size,
    )
    print(f"written: {written}")
