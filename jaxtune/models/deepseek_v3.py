"""DeepSeek-V3, R1, V3.1 and Prover-V2-671B: latent attention, sigmoid routing within groups.

Source: transformers' modeling_deepseek_v3.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.experts.moe import Routing
from jaxtune.models.hf_config import positive, read, require, size
from jaxtune.models.mixture import MOST_EXPERTS, MOST_SCALE, build_mixture, latent_attention

# Defaults of transformers' DeepseekV3Config.
ABSENT = {
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
}


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``DeepseekV3ForCausalLM`` config.json."""
    config = {**ABSENT, **config}
    require(config, "scoring_func", ("sigmoid", None))
    require(config, "topk_method", ("noaux_tc", None))
    require(config, "num_local_experts", (None, config.get("n_routed_experts")))
    routing = Routing(
        experts=size(config, "n_routed_experts", most=MOST_EXPERTS),
        top_k=size(config, "num_experts_per_tok"),
        scores="sigmoid",
        groups=size(config, "n_group", 8),
        top_groups=size(config, "topk_group", 4),
        group_top=2,
        masked=-math.inf,
        normalize=read(config, "norm_topk_prob", bool, True),
        scale=positive(config, "routed_scaling_factor", 2.5, most=MOST_SCALE),
        correction_bias=True,
    )
    interleaved = read(config, "rope_interleave", bool, True)
    return build_mixture(config, *latent_attention(config, interleaved=interleaved), routing)
