"""Compares training on a quantized base with training on a float32 base.

    python benchmarks/quantized_training.py [--steps 160] [--formats nf4 int8] [--seeds 0 1 2]
        [--method pissa]

Trains the quickstart on SmolLM2-135M-Instruct in float32 (LoRA) and in each format (LoRA, or
`--method`), with the same seeds, batches and schedule. Prints the held-out loss of each seed, its
mean, the share of correct answer tokens, and the increase in perplexity over float32. Each run
takes 4 to 18 minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import jaxtune
from jaxtune.config import load_file

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"
FORMATS = ("nf4", "int4", "int8", "fp8")


def last_evaluation(
    form: str, method: str, steps: int, seed: int, workdir: Path
) -> dict[str, float]:
    """Trains on a base in a weight format, float32 if empty; returns the last held-out scores."""
    config = load_file(QUICKSTART)
    config.quantize.format, config.adapter.method, config.training.seed = form, method, seed
    config.training.steps = config.evaluation.every = config.checkpoint.every = steps
    return jaxtune.train(config, workdir / f"{form or 'float32'}-{seed}").evaluations()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=["nf4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--method", default="lora", help="for quantized bases: lora, pissa, …")
    arguments = parser.parse_args()
    print("| base | held-out loss by seed | mean | correct tokens | perplexity over float32 |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as workdir:
        plain = math.nan
        for form in ("", *arguments.formats):
            method = arguments.method if form else "lora"
            scores = [
                last_evaluation(form, method, arguments.steps, seed, Path(workdir))
                for seed in arguments.seeds
            ]
            losses = [score["loss"] for score in scores]
            loss = statistics.fmean(losses)
            right = statistics.fmean(score["token_accuracy"] for score in scores)
            plain = loss if not form else plain
            print(
                f"| {form or 'float32'} | {' '.join(f'{each:.4f}' for each in losses)} | "
                f"{loss:.4f} | {right:.2%} | {math.exp(loss - plain) - 1:+.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
