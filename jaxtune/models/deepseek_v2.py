"""DeepSeek-V2, V2-Lite, V2.5, Coder-V2 and ESFT: latent attention, greedy or group-limited routing.

Source: transformers' modeling_deepseek_v2.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import JaxtuneError, shown
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.experts.moe import Routing
from jaxtune.models.hf_config import positive, read, require, size
from jaxtune.models.mixture import MOST_EXPERTS, MOST_SCALE, build_mixture, latent_attention

# Defaults of transformers' DeepseekV2Config.
ABSENT = {"n_shared_experts": 2, "q_lora_rank": 1536}


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``DeepseekV2ForCausalLM`` config.json."""
    config = {**ABSENT, **config}
    require(config, "scoring_func", ("softmax", None))
    require(config, "mlp_bias", (False, None))
    require(config, "num_experts", (None, config.get("n_routed_experts")))
    method = read(config, "topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise JaxtuneError(
            f'config.json: "topk_method"={shown(method)} is not supported (only greedy, '
            "group_limited_greedy)"
        )
    limited = method == "group_limited_greedy"
    routing = Routing(
        experts=size(config, "n_routed_experts", most=MOST_EXPERTS),
        top_k=size(config, "num_experts_per_tok"),
        groups=size(config, "n_group") if limited else 1,
        top_groups=size(config, "topk_group") if limited else 1,
        # The reference does not read norm_topk_prob.
        scale=positive(config, "routed_scaling_factor", 1.0, most=MOST_SCALE),
    )
    return build_mixture(config, *latent_attention(config), routing)
