"""The Qwen3 architecture: R1-0528-Qwen3. Queries and keys are normalised before their rotation.

Source: transformers' modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.layers.decoder import CausalLM
from jaxtune.models.dense import build_dense
from jaxtune.models.hf_config import read

# Default of transformers' Qwen3Config, which does not depend on the hidden size.
HEAD_DIM = 128


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``Qwen3ForCausalLM`` config.json."""
    bias = read(config, "attention_bias", bool, False)
    return build_dense(
        config,
        bias=bias,
        output_bias=bias,
        mlp_bias=False,
        qk_norm=True,
        default_head_dim=HEAD_DIM,
    )
