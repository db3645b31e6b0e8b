"""Memory of a step by formulas, for hardware without a compiler.

The arguments of a step are known exactly; the memory of its intermediate arrays is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtune.planning.arguments import by_kind, bytes_per_device, step_arguments
from jaxtune.training.setup import Setup

_SAVED = {"full": (), "save_attention": ("out",), "save_qkv": ("out", "qkv")}


def temporaries(setup: Setup, mesh: Mapping[str, int]) -> int:
    """Estimates the bytes per device of a step's intermediate arrays.

    Args:
      setup: set-up of the run, on any devices.
      mesh: devices along each mesh axis.
    """
    config, definition = setup.config, setup.definition
    rows, length = setup.batch_like()["tokens"].shape
    split = math.prod(mesh[axis] for axis in ("data", "fsdp", "expert", "sequence"))
    tokens = max(rows // config.training.accumulation * length // split, 1)
    tensor, width = mesh["tensor"], setup.options.dtype.itemsize
    hidden = definition.hidden_size
    # Activations that the remat policy saves for the backward pass, in addition to the input of
    # each layer.
    kept = {"out", "qkv", "mlp"} if config.training.remat in ("none", "save_mlp") else set()
    kept |= set(_SAVED.get(config.training.remat, ()))
    saved, working = definition.layer_count * hidden, 0
    for blocks in definition.blocks:
        parts = blocks.layer.activation_widths
        saved += blocks.count * sum(size for name, size in parts.items() if name in kept) // tensor
        # A layer's activations and their cotangents.
        working = max(working, 2 * (4 * hidden + sum(parts.values()) // tensor))
    arguments = by_kind(step_arguments(setup))
    vocabulary = definition.vocab_size
    chunk = min(tokens, setup.options.tokens_per_chunk)
    columns = vocabulary // tensor if vocabulary % tensor == 0 else vocabulary
    logits = 3 * 4 * chunk * columns  # float32: logits, probabilities, cotangents
    matrix = max(math.prod(leaf.declaration.shape) for leaf in definition.leaves.values())
    gradients = 2 * bytes_per_device(arguments["trainable"], mesh)
    return tokens * width * (saved + working) + logits + 2 * width * matrix // tensor + gradients
