"""Compares estimated collectives of a step with those of programs compiled for eight TPU chips.

    python benchmarks/collectives.py [CASE …]

Needs the extra tpu-plan, and a minute per case; no TPU. Prints the table of docs/planning.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxtune.config import resolve
from jaxtune.planning.plan import compile_plan
from jaxtune.planning.topology import find_topology
from jaxtune.planning.traffic import estimated_collectives
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

DENSE = {
    **{"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 8},
    **{"intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8},
    **{"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
}
MIXTURE = {
    **{"model_type": "deepseek_v3", "vocab_size": 32000, "hidden_size": 1024},
    **{"intermediate_size": 2816, "moe_intermediate_size": 512, "num_hidden_layers": 6},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 384},
    **{"kv_lora_rank": 256, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
    **{"n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 4},
    **{"first_k_dense_replace": 2, "topk_group": 2, "rope_theta": 10000.0},
    **{"routed_scaling_factor": 2.5, "norm_topk_prob": True, "tie_word_embeddings": False},
}
LORA, FULL = {"rank": 16, "targets": "attention"}, {"method": "full"}
CASES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, Any]]] = {
    "dense, LoRA, data=8": (DENSE, {"data": 8}, LORA),
    "dense, LoRA, fsdp=8": (DENSE, {"data": 1, "fsdp": 8}, LORA),
    "dense, LoRA, tensor=8": (DENSE, {"data": 1, "tensor": 8}, LORA),
    "dense, LoRA, fsdp=4, tensor=2": (DENSE, {"data": 1, "fsdp": 4, "tensor": 2}, LORA),
    "dense, full, fsdp=8": (DENSE, {"data": 1, "fsdp": 8}, FULL),
    "experts, LoRA, fsdp=2, expert=4": (MIXTURE, {"data": 1, "fsdp": 2, "expert": 4}, LORA),
}


def row(case: str) -> str:
    """Returns a line of the table: megabytes that each device sends in a step."""
    model, mesh, adapter = CASES[case]
    sections = {
        "data": {"max_length": 1024},
        "mesh": mesh,
        "adapter": adapter,
        "training": {"batch_size": 8, "accumulation": 1},
    }
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(model))
        config = resolve(sections | {"model": {"path": directory}})
        hardware = find_topology("v5e:2x4")
        setup = set_up(config, model, choose_method(config.adapter)[0], hardware.group)
        found = compile_plan(setup, hardware).sent or []
    compiled, estimated = (
        sum(each.times * each.sent for each in collectives) / 1e6
        for collectives in (found, estimated_collectives(setup))
    )
    deviation = round(100 * (estimated / compiled - 1))
    return f"| {case} | {compiled:,.0f} | {estimated:,.0f} | {deviation} % |"


if __name__ == "__main__":
    print("| model, method, mesh | compiled | estimated | deviation |\n|---|---|---|---|")
    for case in sys.argv[1:] or CASES:
        print(row(case), flush=True)
