"""DeepSeek-V3, R1, V3.1 and Prover-V2-671B: latent attention, sigmoid routing within groups.

Source: transformers' modeling_deepseek_v3.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.moe import Routing
from jaxtune.models.hf_config import read, require, size
from jaxtune.models.mixture import build_mixture, latent_attention


def build(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model of a ``DeepseekV3ForCausalLM`` config.json."""
    require(config, "scoring_func", ("sigmoid",))
    require(config, "topk_method", ("noaux_tc",))
    require(config, "rope_interleave", (True, None))
    routing = Routing(
        experts=size(config, "n_routed_experts"),
        top_k=size(config, "num_experts_per_tok"),
        scores="sigmoid",
        groups=size(config, "n_group", 8),
        top_groups=size(config, "topk_group", 4),
        group_top=2,
        masked=-math.inf,
        normalize=read(config, "norm_topk_prob", bool, True),
        scale=read(config, "routed_scaling_factor", float, 2.5),
        correction_bias=True,
    )
    return build_mixture(config, *latent_attention(config), routing)
