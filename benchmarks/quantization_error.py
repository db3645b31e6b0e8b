"""Measures the error of quantizing a pretrained model, for each weight format.

    python benchmarks/quantization_error.py [--examples 32]

Loads SmolLM2-135M-Instruct in float32 and in every format. Prints the bits per quantized weight,
the relative error of the weights (Frobenius norm), the mean negative log-likelihood of the answers
in the quickstart's held-out examples, and its difference from float32. The source file stores the
model in 4 bits with groups of 32, which favors formats with such groups.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import jaxtune
from jaxtune.config import load_file
from jaxtune.data import DataSettings, Examples, eval_batches, load_examples
from jaxtune.layers.tree import flatten
from jaxtune.quant import is_quantized, materialize

ROOT = Path(__file__).resolve().parent.parent
FORMATS: dict[str, dict[str, Any]] = {
    "nf4, double": {"format": "nf4"},
    "nf4": {"format": "nf4", "double": False},
    "int4, groups of 64": {"format": "int4"},
    "int4, groups of 64, asymmetric": {"format": "int4", "symmetric": False},
    "int4, groups of 32": {"format": "int4", "group_size": 32},
    "int4, groups of 32, asymmetric": {"format": "int4", "group_size": 32, "symmetric": False},
    "int4, per channel": {"format": "int4", "group_size": 0},
    "int8": {"format": "int8"},
    "fp8": {"format": "fp8"},
}


def held_out_loss(model: jaxtune.Model, examples: Examples) -> float:
    """Returns the mean negative log-likelihood of the targets, in nats."""
    total, count = 0.0, 0
    for batch in eval_batches(examples, batch_size=4, length=256, packing=True):
        logits = np.asarray(
            model.logits(batch["tokens"], batch["segment_ids"], batch["positions"]), np.float64
        )
        rows, places = np.nonzero(batch["targets"] >= 0)
        chosen = logits[rows, places]
        target = chosen[np.arange(len(rows)), batch["targets"][rows, places]]
        peak = chosen.max(axis=-1)
        total += (peak + np.log(np.exp(chosen - peak[:, None]).sum(-1)) - target).sum()
        count += len(rows)
    return total / count


def weight_error(quantized: jaxtune.Model, exact: dict[Any, Any]) -> tuple[float, float]:
    """Returns the bits per quantized weight and the relative error over all quantized weights.

    Args:
      quantized: quantized model.
      exact: float32 weights by path, in the shapes of the quantized ones.
    """
    size, count, wrong, norm = 0, 0, 0.0, 0.0
    for path, leaf in flatten(quantized.base):
        if not is_quantized(leaf):
            continue
        value = np.asarray(materialize(leaf, np.float32), np.float64)
        plain = np.asarray(exact[path], np.float64)
        size += quantized.definition.leaves[path].nbytes
        count += plain.size
        wrong += np.square(value - plain).sum()
        norm += np.square(plain).sum()
    return 8 * size / count, float(np.sqrt(wrong / norm))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=32)
    count = parser.parse_args().examples
    config = load_file(ROOT / "configs" / "quickstart.py")

    def load(quantize: dict[str, Any] | None) -> jaxtune.Model:
        return jaxtune.load(config.model.path, quantize=quantize, dtype="float32", progress=False)

    plain = load(None)
    every = load_examples(config.data.eval, DataSettings(max_length=256), tokenizer=plain.tokenizer)
    examples = Examples(every.tokens[:count], every.targets[:count], every.places[:count])
    exact, loss = dict(flatten(plain.base)), held_out_loss(plain, examples)
    print("| format | bits a weight | relative error | loss | change |\n|---|---|---|---|---|")
    print(f"| float32 | 32 | 0 | {loss:.4f} | |")
    for name, quantize in FORMATS.items():
        model = load(quantize)
        bits, error = weight_error(model, exact)
        changed = held_out_loss(model, examples)
        print(
            f"| {name} | {bits:.2f} | {error:.4f} | {changed:.4f} | {changed - loss:+.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
