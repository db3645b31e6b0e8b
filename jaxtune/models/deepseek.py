"""DeepSeek-MoE-16B: LLaMA's attention, a softmax router and shared experts.

Source: Dai et al., 2024 (DeepSeekMoE), and the modeling code of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.layers.attention import Attention
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.experts.moe import Routing
from jaxtune.models.hf_config import divisor, read, require, size
from jaxtune.models.mixture import MOST_EXPERTS, build_mixture


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``DeepseekForCausalLM`` config.json."""
    require(config, "scoring_func", ("softmax",))
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    kv_heads, head_dim = size(config, "num_key_value_heads", heads, null=heads), hidden // heads
    divisor(config, "num_attention_heads", "hidden_size", heads)
    divisor(config, "num_key_value_heads", "num_attention_heads", kv_heads)
    bias, top_k = read(config, "attention_bias", bool, False), size(config, "num_experts_per_tok")
    routing = Routing(
        experts=size(config, "n_routed_experts", most=MOST_EXPERTS),
        top_k=top_k,
        # The reference does not normalize the weight of a single expert.
        normalize=top_k > 1 and read(config, "norm_topk_prob", bool, False),
        float32=False,
    )
    return build_mixture(
        config,
        lambda: Attention(hidden, heads, kv_heads, head_dim, bias=bias, output_bias=bias),
        head_dim,
        routing,
    )
