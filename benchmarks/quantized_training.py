"""What training over a quantized base comes to beside training over the base as it is.

    python benchmarks/quantized_training.py [--steps 160] [--formats nf4 int8]

Trains the quickstart over SmolLM2-135M-Instruct in float32 and in each format, with the same seed,
batches and schedule, and prints the held-out loss, what share of the answers' tokens is right, and
how much larger the perplexity is than over float32. Two cores take 4 to 18 minutes for each run.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import jaxtune
from jaxtune.config import load_file

QUICKSTART = Path(__file__).resolve().parent.parent / "configs" / "quickstart.py"
FORMATS = ("nf4", "int4", "int8", "fp8")


def last_evaluation(form: str, steps: int, workdir: Path) -> dict[str, float]:
    """Trains over a format, or over float32 where it is empty; returns the last scores."""
    config = load_file(QUICKSTART)
    config.quantize.format = form
    config.training.steps = config.evaluation.every = config.checkpoint.every = steps
    return jaxtune.train(config, workdir / (form or "float32")).evaluations()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nf4"])
    arguments = parser.parse_args()
    print("| base | held-out loss | tokens right | perplexity above float32's |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as workdir:
        plain = math.nan
        for form in ("", *arguments.formats):
            scores = last_evaluation(form, arguments.steps, Path(workdir))
            loss = scores["loss"]
            plain = loss if not form else plain
            print(
                f"| {form or 'float32'} | {loss:.4f} | {scores['token_accuracy']:.2%} | "
                f"{math.exp(loss - plain) - 1:+.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
