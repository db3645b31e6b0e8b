"""The Qwen2 architecture: R1-Distill-Qwen. LLaMA with a bias on q, k and v, but not on o.

Source: transformers' modeling_qwen2.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.layers.decoder import CausalLM
from jaxtune.models.dense import build_dense


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``Qwen2ForCausalLM`` config.json."""
    return build_dense(config, bias=True, output_bias=False, mlp_bias=False, qk_norm=False)
