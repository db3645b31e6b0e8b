"""Configurations of PEFT adapters, as in PEFT's own tests.

Module names are those of LLaMA; `settings_for` translates them to another architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft import (
    IA3Config,
    KasaConfig,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeloraConfig,
    VeraConfig,
)
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig


class Case(NamedTuple):
    """A configuration of PEFT, and the expected outcome of loading its adapter.

    Attributes:
      config: class of the configuration.
      settings: arguments of the class.
      refused: regular expression that the error must match; empty if the adapter is supported.
      bases: architectures to test; empty: all.
    """

    config: type
    settings: dict[str, Any]
    refused: str = ""
    bases: tuple[str, ...] = ()


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = ("llama", "qwen2")
MIXTURE = ("deepseek_v3",)
TIED = ("tied",)
Q = {"target_modules": ["q_proj"]}
ALPHA = {"r": 4, "lora_alpha": 7, "target_modules": ATTENTION}
VIRTUAL = {"num_virtual_tokens": 4}
BIASED = {"target_modules": ["q_proj", "o_proj"]}


def _lora(refused: str = "", bases: tuple[str, ...] = (), **settings: Any) -> Case:
    return Case(LoraConfig, {"r": 4} | settings, refused, bases)


def _unread(setting: str, value: Any, **settings: Any) -> Case:
    return _lora(f'"{setting}"', ("llama",), **(Q | settings), **{setting: value})


CASES: dict[str, Case] = {
    "targets-string": _lora(target_modules=".*q_proj"),
    "targets-list": _lora(target_modules=["q_proj", "o_proj"]),
    "targets-regex": _lora(target_modules=r".*layers\.[02]\.self_attn\.(q|o)_proj"),
    "targets-default": _lora(bases=DENSE, target_modules=None),
    "all-linear": _lora(target_modules="all-linear", lora_alpha=7),
    "mlp": _lora(bases=DENSE, target_modules=["gate_proj", "up_proj", "down_proj"]),
    "alpha-dropout": _lora(**(ALPHA | {"lora_dropout": 0.1})),
    "rslora": _lora(**ALPHA, use_rslora=True),
    "exclude": _lora(target_modules=["q_proj", "o_proj"], exclude_modules=["o_proj"]),
    "exclude-regex": _lora(target_modules=["q_proj", "o_proj"], exclude_modules=r".*\.1\..*o_proj"),
    "negative-alpha": _lora(target_modules=["q_proj"], lora_alpha=-3, alpha_pattern={"x": -1}),
    "layers": _lora(target_modules=["q_proj"], layers_to_transform=[0, 2]),
    "layers-patterns": _lora(
        target_modules=["q_proj"], layers_to_transform=[2], layers_pattern=["h", "layers"]
    ),
    "layers-pattern": _lora(
        target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"
    ),
    "patterns": _lora(
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"o_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
        alpha_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 3, "o_proj": 11},
    ),
    "patterns-rslora": _lora(
        target_modules=["q_proj"], rank_pattern={"q_proj": 2}, use_rslora=True, lora_alpha=5
    ),
    "head": _lora(target_modules=["q_proj", "lm_head"]),
    "head-dropout": _lora(bases=("llama",), target_modules=["q_proj", "lm_head"], lora_dropout=0.1),
    "dora": _lora(**ALPHA, use_dora=True),
    "dora-head": _lora(bases=("llama",), target_modules=["q_proj", "lm_head"], use_dora=True),
    "gaussian": _lora(**Q, init_lora_weights="gaussian"),
    "orthogonal": _lora(**Q, init_lora_weights="orthogonal"),
    "mica": _lora(**Q, init_lora_weights="mica"),
    "pissa": _lora('"init_lora_weights"', ("llama",), **Q, init_lora_weights="pissa"),
    "pissa-niter": _lora('"init_lora_weights"', ("llama",), **Q, init_lora_weights="pissa_niter_4"),
    "olora": _lora('"init_lora_weights"', ("llama",), **Q, init_lora_weights="olora"),
    "saved": _lora(**Q, modules_to_save=["lm_head", "norm"]),
    "saved-embedding": _lora(**Q, modules_to_save=["embed_tokens"]),
    "saved-container": _lora(bases=DENSE, **Q, modules_to_save=["mlp"]),
    "saved-attention": _lora(
        bases=DENSE, target_modules=["up_proj"], modules_to_save=["self_attn"]
    ),
    "saved-experts": _lora('"modules_to_save": experts', MIXTURE, **Q, modules_to_save=["experts"]),
    "saved-mixture": _lora('"modules_to_save": mlp', MIXTURE, **Q, modules_to_save=["mlp"]),
    "saved-nothing": _lora(
        '"modules_to_save": "score"', ("llama",), **Q, modules_to_save=["score"]
    ),
    "bias-all": _lora(bases=DENSE, **BIASED, bias="all"),
    "bias-lora-only": _lora(bases=DENSE, **BIASED, bias="lora_only"),
    "bias-all-saved": _lora(
        bases=("qwen2",), target_modules=["o_proj"], modules_to_save=["q_proj"], bias="all"
    ),
    "bias-some-layers": _lora(
        'adapter_config.json: "bias"', ("qwen2",), **Q, bias="lora_only", layers_to_transform=[1]
    ),
    "tokens": _lora(**Q, trainable_token_indices=[157, 158, 159]),
    "tokens-anywhere": _lora(**Q, trainable_token_indices=[9, 3, 121]),
    "tokens-dict": _lora(**Q, trainable_token_indices={"embed_tokens": [3, 9]}),
    "tokens-twice": _lora(
        '"trainable_token_indices"', ("llama",), **Q, trainable_token_indices=[5, 5]
    ),
    "tokens-head": _lora(**Q, trainable_token_indices={"lm_head": [3, 9]}),
    "tokens-both": _lora(
        **Q, trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [9, 4, 1]}
    ),
    "tokens-dora": _lora(bases=("llama",), **Q, use_dora=True, trainable_token_indices=[3]),
    "tokens-saved-head": _lora(
        bases=("llama",), **Q, modules_to_save=["lm_head"], trainable_token_indices=[3]
    ),
    "embedding": _lora("embed_tokens", ("llama", *TIED), target_modules=["q_proj", "embed_tokens"]),
    "parameters": _lora(
        bases=MIXTURE,
        target_modules=["o_proj"],
        target_parameters=["experts.gate_up_proj", "gate.weight"],
    ),
    "lora-bias": _unread("lora_bias", True),
    "velora": _unread("velora_config", VeloraConfig(num_groups=2, init_type="random")),
    "alora": _unread("alora_invocation_tokens", [5, 9], task_type="CAUSAL_LM"),
    "replicated": _unread("layer_replication", [[0, 2], [1, 3]]),
    "kasa": _unread("kasa_config", KasaConfig()),
    "monteclora": _unread("monteclora_config", MontecloraConfig(num_samples=2)),
    "bdlora": _unread("use_bdlora", BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)),
    "tied-head": _lora("lm_head is tied", TIED, target_modules=["lm_head", "q_proj"]),
    "tied-saved": _lora("both embedding and head", TIED, **Q, modules_to_save=["embed_tokens"]),
    "tied-tokens": _lora(bases=TIED, **Q, trainable_token_indices=[3, 9]),
    "tied-tokens-same": _lora(
        bases=TIED, **Q, trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 9]}
    ),
    "tied-tokens-others": _lora(
        "are tied in this model",
        TIED,
        **Q,
        trainable_token_indices={"embed_tokens": [3, 9], "lm_head": [3, 8]},
    ),
    "tied-tokens-head": _lora(
        "are tied in this model", TIED, **Q, trainable_token_indices={"lm_head": [3, 9]}
    ),
    "ia3": Case(IA3Config, {"target_modules": ATTENTION, "feedforward_modules": []}),
    "ia3-inputs": Case(
        IA3Config, {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]}
    ),
    "ia3-both": Case(
        IA3Config, {"target_modules": ["k_proj", "o_proj"], "feedforward_modules": ["o_proj"]}
    ),
    "ia3-default": Case(IA3Config, {}, bases=DENSE),
    "ia3-saved": Case(IA3Config, Q | {"feedforward_modules": [], "modules_to_save": ["lm_head"]}),
    "ia3-some-layers": Case(
        IA3Config,
        {"target_modules": ["o_proj"], "feedforward_modules": r".*layers\.1\.self_attn\.o_proj"},
        'adapter_config.json: "feedforward_modules"',
        ("llama",),
    ),
    "vera": Case(VeraConfig, {"r": 8, "target_modules": ["q_proj", "o_proj"]}),
    "vera-layers": Case(VeraConfig, {"r": 8, **Q, "layers_to_transform": [1]}),
    "vera-saved": Case(VeraConfig, {"r": 8, **Q, "modules_to_save": ["lm_head"]}),
    "vera-bias": Case(VeraConfig, {"r": 8, **Q, "bias": "all"}, '"bias"', ("qwen2",)),
    "vera-no-projection": Case(
        VeraConfig, {"r": 8, **Q, "save_projection": False}, "save_projection=True", ("llama",)
    ),
    "prompt": Case(PromptTuningConfig, VIRTUAL),
    "ptuning": Case(PromptEncoderConfig, VIRTUAL | {"encoder_hidden_size": 16}, bases=("llama",)),
    "prefix": Case(PrefixTuningConfig, VIRTUAL, bases=DENSE),
    "prompt-saved": Case(
        PromptTuningConfig,
        VIRTUAL | {"modules_to_save": ["lm_head"]},
        "modules_to_save",
        ("llama",),
    ),
    "loha": Case(LoHaConfig, Q, "LOHA", ("llama",)),
    "tokens-alone": Case(
        TrainableTokensConfig, {"token_indices": [3, 9]}, "TRAINABLE_TOKENS", ("llama",)
    ),
}
# Cases that depend on the architecture; the quick tests try all others on LLaMA only.
EVERYWHERE = {
    "targets-default",
    "all-linear",
    "mlp",
    "alpha-dropout",
    "patterns",
    "head",
    "dora",
    "saved",
    "saved-container",
    "saved-attention",
    "bias-all",
    "bias-lora-only",
    "tokens-both",
    "ia3",
    "ia3-both",
    "ia3-default",
    "vera",
    "prefix",
}
# Projections of DeepSeek-V3 that correspond to those of LLaMA.
_LATENT = {"q_proj": "q_b_proj", "k_proj": "kv_a_proj_with_mqa", "v_proj": "kv_b_proj"}


def settings_for(base: str, value: Any) -> Any:
    """Returns settings with the module names of the architecture `base`."""
    if base != "deepseek_v3":
        return value
    if isinstance(value, Mapping):
        return {settings_for(base, k): settings_for(base, v) for k, v in value.items()}
    if isinstance(value, list):
        return [settings_for(base, item) for item in value]
    if isinstance(value, str):
        for name, latent in _LATENT.items():
            value = value.replace(name, latent)
        return value.replace("(q|o)_proj", "(q_b|o)_proj")
    return value
