"""Memory of a step by formulas, for what is decided before anything is compiled.

The arguments of a step are known exactly; the memory of its intermediate arrays is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from jaxtune.layers.decoder import ForwardOptions
from jaxtune.models.definition import Definition
from jaxtune.parallel import memory

_SAVED = {"full": (), "save_attention": ("out",), "save_qkv": ("out", "qkv")}


def temporaries(
    definition: Definition,
    options: ForwardOptions,
    mesh: Mapping[str, int],
    tokens: int,
    trainable: int,
) -> int:
    """Estimates the bytes per device of a step's intermediate arrays.

    Args:
      definition: definition of the model.
      options: options of the forward pass.
      mesh: devices along each mesh axis.
      tokens: tokens per device of a micro-batch.
      trainable: bytes per device of the trainable tree.
    """
    tensor, width, hidden = mesh["tensor"], options.dtype.itemsize, definition.hidden_size
    # Activations that the remat policy saves for the backward pass, in addition to the input of
    # each layer.
    kept = {"out", "qkv", "mlp"} if options.remat in ("none", "save_mlp") else set()
    kept |= set(_SAVED.get(options.remat, ()))
    saved, working = definition.layer_count * hidden, 0
    for blocks, edited in zip(definition.blocks, _edited_widths(definition), strict=True):
        parts = blocks.layer.activation_widths
        saved += blocks.count * sum(size for name, size in parts.items() if name in kept) // tensor
        # A layer's activations and their cotangents, those of edited projections in float32.
        values = 4 * hidden + sum(parts.values()) // tensor
        working = max(working, 2 * (width * values + 4 * edited // tensor))
    vocabulary = definition.vocab_size
    chunk = min(tokens, options.tokens_per_chunk)
    columns = vocabulary // tensor if vocabulary % tensor == 0 else vocabulary
    logits = 3 * 4 * chunk * columns  # float32: logits, probabilities, cotangents
    # A weight that is gathered, dequantized or cast is held twice: in use, and being prepared.
    prepared = [
        math.prod(leaf.declaration.shape)
        for leaf in definition.in_checkpoint().values()
        if mesh["fsdp"] > 1 or leaf.format is not None or leaf.kind == "trainable"
    ]
    weights = 2 * width * max(prepared, default=0) // tensor
    # The loss and a layer's backward pass follow each other. Gradients: of a micro-batch, and sums.
    at_once = max(tokens * working, logits)
    return tokens * width * saved + at_once + weights + 2 * trainable


def _edited_widths(definition: Definition) -> list[int]:
    """Returns the summed widths of the projections with an adapter in a layer, for each block."""
    widths = [0] * len(definition.blocks)
    for path, module in definition.projections().items():
        if path[:2] != ("model", "layers") or module.adapter is None:
            continue
        block = int(path[2])
        mixture = definition.blocks[block].layer.mixture if "experts" in path else None
        times = 1 if mixture is None else mixture.gate.routing.top_k
        widths[block] += times * module.out_features
    return widths


def bytes_per_device(tree: Any, mesh: Mapping[str, int] | None = None) -> int:
    """Returns the bytes per device of a tree of ShapeDtypeStructs with shardings.

    Args:
      tree: ShapeDtypeStructs of any shape.
      mesh: devices along each mesh axis; by default those of the shardings.
    """
    if mesh is None:
        return memory.bytes_per_device(tree)
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(_shard_shape(leaf, mesh)) * leaf.dtype.itemsize for leaf in leaves)


def _shard_shape(leaf: Any, mesh: Mapping[str, int]) -> tuple[int, ...]:
    spec = (*leaf.sharding.spec, *[None] * leaf.ndim)[: leaf.ndim]
    parts = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    shares = [math.prod(mesh[axis] for axis in axes) for axes in parts]
    # A dimension that the devices do not divide stays whole; see `even_spec`.
    return tuple(n // k if n % k == 0 else n for n, k in zip(leaf.shape, shares, strict=True))
