"""The LLaMA architecture: DeepSeek-LLM, Math, Coder v1 and v1.5, Prover, R1-Distill-Llama.

Source: transformers' modeling_llama.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.layers.decoder import CausalLM
from jaxtune.models.dense import build_dense
from jaxtune.models.hf_config import divisor, read, size


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``LlamaForCausalLM`` config.json."""
    bias = read(config, "attention_bias", bool, False)
    mlp_bias = read(config, "mlp_bias", bool, False)
    if config.get("head_dim") is None:
        divisor(config, "num_attention_heads", "hidden_size", size(config, "num_attention_heads"))
    return build_dense(config, bias=bias, output_bias=bias, mlp_bias=mlp_bias, qk_norm=False)
