"""Memory of a step by formula, where there is no compiler for the hardware.

What lies in memory between steps is known exactly; what a step takes besides is estimated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.layers.experts.moe import MoE
from jaxtune.layers.mla import MLA
from jaxtune.planning.arguments import by_kind, bytes_per_device, step_arguments
from jaxtune.training.setup import Setup

_SAVED = {"full": (), "save_attention": ("out",), "save_qkv": ("out", "qkv")}


def temporaries(setup: Setup, mesh: Mapping[str, int]) -> int:
    """Estimates the bytes that a step takes of a device beside its arguments.

    Args:
      setup: of the run on any devices.
      mesh: devices along each mesh axis.
    """
    config, decoder = setup.config, setup.definition.module.model
    rows, length = setup.batch_like()["tokens"].shape
    split = math.prod(mesh[axis] for axis in ("data", "fsdp", "expert", "sequence"))
    tokens = max(rows // config.training.accumulation * length // split, 1)
    tensor, width = mesh["tensor"], setup.options.dtype.itemsize
    hidden = decoder.embed_tokens.weight.get_value().shape[1]
    layers = sum(count for _, count in decoder.run_layers)
    kept = {"out", "qkv", "mlp"} if config.training.remat in ("none", "save_mlp") else set()
    kept |= set(_SAVED.get(config.training.remat, ()))
    saved, working = layers * hidden, 0
    for run, (_, count) in zip(decoder.layers, decoder.run_layers, strict=True):
        parts = _widths(run)
        saved += count * sum(size for name, size in parts.items() if name in kept) // tensor
        # A layer's activations and their cotangents.
        working = max(working, 2 * (4 * hidden + sum(parts.values()) // tensor))
    arguments = by_kind(step_arguments(setup))
    vocabulary = decoder.embed_tokens.weight.get_value().shape[0]
    chunk = min(tokens, setup.options.tokens_per_chunk)
    columns = vocabulary // tensor if vocabulary % tensor == 0 else vocabulary
    logits = 3 * 4 * chunk * columns  # float32: logits, probabilities, cotangents
    matrix = max(math.prod(leaf.declaration.shape) for leaf in setup.definition.leaves.values())
    gradients = 2 * bytes_per_device(arguments["trainable"], mesh)
    return tokens * width * (saved + working) + logits + 2 * width * matrix // tensor + gradients


def _widths(layer: Any) -> dict[str, int]:
    """Returns how many values of each activation a token has within a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    if isinstance(attention, MLA):
        s = attention.sizes
        out, qkv = s.heads * s.v, s.heads * (2 * (s.nope + s.rope) + s.v)
    else:
        out = attention.heads * attention.head_dim
        qkv = out + 2 * attention.kv_heads * attention.head_dim
    if isinstance(mlp, MoE):
        routing = mlp.gate.routing
        experts = mlp.experts.gate_proj
        # Rows of routed experts at the model's width, float32 and back, and at their own.
        wide = routing.top_k * (3 * experts.in_features + 3 * experts.out_features)
        return {"out": out, "qkv": qkv, "mlp": wide}
    return {"out": out, "qkv": qkv, "mlp": 3 * mlp.gate_proj.out_features}
