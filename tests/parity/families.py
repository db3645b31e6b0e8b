"""Tiny random checkpoints of the DeepSeek families, with all features that affect parity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import deepseek_moe
import torch
from oracles import load_torch
from transformers import AutoConfig, AutoModelForCausalLM

SHARED = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    # Ten times the default, so that attention, routing and logits are far from uniform. Two experts
    # whose scores differ by less than the rounding error are then rare; no seed here has any.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "deepseek": {
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "scoring_func": "softmax",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "deepseek_v2": LATENT
    | {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.0,
    },
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2, "n_shared_experts": 1},
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
}


class Families:
    """Makes checkpoints in a directory; equal arguments return the same one, which is read-only."""

    def __init__(self, directory: Path):
        self._directory = directory

    def __call__(self, model_type: str, *, seed: int = 0, **changes: Any) -> Path:
        """Returns a float32 checkpoint whose norms, biases and buffers are random as well."""
        key = json.dumps([model_type, seed, changes], sort_keys=True)
        directory = self._directory / hashlib.sha256(key.encode()).hexdigest()[:16]
        if directory.is_dir():
            return directory
        torch.manual_seed(seed)
        settings = SHARED | DEFAULTS[model_type] | changes
        if model_type == "deepseek":
            model: Any = deepseek_moe.build(settings)
            for _, value in model.named_parameters():
                if value.ndim > 1:
                    torch.nn.init.normal_(value, std=settings["initializer_range"])
        else:
            config = AutoConfig.for_model(model_type, **settings)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model)
        directory.mkdir()
        if model_type == "deepseek":
            deepseek_moe.save(model, settings | {"model_type": "deepseek"}, directory)
        else:
            model.save_pretrained(directory)
        return directory


@torch.no_grad()
def randomize(model: Any) -> None:
    """Draws random values for all weights and buffers with constant initial values."""
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value.normal_(mean=float("norm" in name), std=0.3)
        elif name.endswith("mlp.gate.weight"):
            value.normal_(std=model.config.initializer_range)
    for name, value in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            value.normal_(std=0.3)


def reference(directory: str | Path) -> Any:
    """Loads a checkpoint in torch, in float32."""
    config = json.loads((Path(directory) / "config.json").read_text())
    if config["model_type"] == "deepseek":
        return deepseek_moe.load(directory)
    return load_torch(directory)
