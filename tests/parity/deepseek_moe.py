"""DeepSeek-MoE-16B in torch: LLaMA with a mixture of experts. It is not part of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

FILE = "model.safetensors"


class FeedForward(nn.Module):
    """The gated feed-forward layer ``down(silu(gate(x)) · up(x))`` on [B, T, hidden]."""

    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    """A mixture of experts; every expert sees every token, with weight 0 if it is not chosen."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, width = config["hidden_size"], config["moe_intermediate_size"]
        experts, shared = config["n_routed_experts"], config["n_shared_experts"]
        self.top_k, self.normalize = config["num_experts_per_tok"], config["norm_topk_prob"]
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(hidden, width) for _ in range(experts))
        self.shared_experts = FeedForward(hidden, shared * width) if shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, index = self.gate(x).softmax(-1).topk(self.top_k)
        # DeepSeek's code does not normalize the weight of a single expert.
        if self.normalize and self.top_k > 1:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        weights = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(-1, index, chosen)
        out = sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts))
        return out if self.shared_experts is None else out + self.shared_experts(x)


def build(config: dict[str, Any]) -> LlamaForCausalLM:
    """Returns a randomly initialized model from the content of a config.json."""
    known = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    model = LlamaForCausalLM(LlamaConfig(**known))
    for i, layer in enumerate(model.model.layers):
        if i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0:
            layer.mlp = Mixture(config)
    return model.eval()


def save(model: LlamaForCausalLM, config: dict[str, Any], directory: Path) -> None:
    """Writes a checkpoint in DeepSeek's format, whose names are those of the modules above."""
    (directory / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), directory / FILE, metadata={"format": "pt"})


def load(directory: str | Path) -> LlamaForCausalLM:
    """Loads a checkpoint written by `save` or by jaxtune, in float32."""
    directory = Path(directory)
    model = build(json.loads((directory / "config.json").read_text()))
    tensors = {
        k: v.float() for path in directory.glob("*.safetensors") for k, v in load_file(path).items()
    }
    model.load_state_dict(tensors)
    return model
