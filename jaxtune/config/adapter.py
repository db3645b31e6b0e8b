"""The ``adapter`` section: the fine-tuning method and its settings.

`jaxtune.registry.METHODS` lists the options that each method reads.
"""

from __future__ import annotations

import dataclasses

from jaxtune.config.option import Section, option
from jaxtune.registry import METHODS, PLACEMENTS


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Section):
    """The ``adapter`` section."""

    method: str = option(
        "lora",
        "fine-tuning method: lora, dora, pissa, vera, ia3, bitfit, prompt, ptuning, prefix, "
        "bottleneck, esft (the routed experts that the data uses most) or full (every weight)",
        choices=METHODS,
    )
    rank: int = option(16, "rank r of the low-rank factors", minimum=1)
    alpha: float = option(32.0, "LoRA: the scale is alpha / rank", minimum=0)
    rslora: bool = option(False, "LoRA: the scale is alpha / √rank, for high ranks")
    dropout: float = option(
        0.0,
        "dropout rate on the input of LoRA and VeRA, between the layers of P-Tuning's LSTM, or on "
        "the output of a bottleneck",
        minimum=0,
        maximum=0.999,
    )
    targets: tuple[str, ...] = option(
        ("attention",),
        "modules to adapt: names such as q_proj; attention, mlp (with shared experts), experts "
        "(routed ones) or all (= all-linear); or a regular expression that matches whole paths",
        names=True,
    )
    layers: str = option("", "layers to adapt, such as 0,4-7; empty: all")
    rank_pattern: tuple[str, ...] = option(
        (),
        "ranks of individual modules, such as up_proj=8; patterns match the ends of paths",
        names=True,
    )
    alpha_pattern: tuple[str, ...] = option(
        (), "alphas of individual modules, such as up_proj=8", names=True
    )
    modules_to_save: tuple[str, ...] = option(
        (), "modules trained in full and stored with the adapter, such as lm_head", names=True
    )
    bias: str = option(
        "none",
        "LoRA: biases that are trained too: none, all, or lora_only (those of the targets)",
        choices=("none", "all", "lora_only"),
    )
    new_tokens: int = option(
        0,
        "number of tokens at the end of the tokenizer's vocabulary whose rows in the embedding and "
        "in an untied head are trained",
        minimum=0,
    )
    train_tokens: tuple[str, ...] = option(
        (), "names of further tokens whose rows are trained, such as <sql>,</sql>", names=True
    )
    freeze: tuple[str, ...] = option(
        (),
        "full: weights to freeze: names of modules, or regular expressions for the start of names: "
        r"model.embed_tokens,model\.layers\.[0-3]\.",
        names=True,
    )
    expert_scores: str = option(
        "",
        "ESFT: file with the scores that select the experts, from jaxtune experts score, or an "
        "expert config from ESFT's authors; empty: a new run scores its training data",
    )
    expert_score: str = option(
        "token",
        "ESFT: score of an expert: the share of tokens routed to it (token) or its mean gate "
        "weight (gate)",
        choices=("token", "gate"),
    )
    expert_threshold: float = option(
        0.2,
        "ESFT: each layer trains the fewest experts whose scores add up to this share",
        minimum=0.001,
        maximum=1,
    )
    expert_sample: int = option(
        131072, "ESFT: number of training tokens on which the experts are scored", minimum=1
    )
    feedforward: tuple[str, ...] = option(
        ("down_proj",),
        "(IA)³: modules scaled at their inputs; adapter.targets are scaled at their outputs",
        names=True,
    )
    virtual_tokens: int = option(20, "number of virtual tokens before each example", minimum=1)
    prompt_init_text: str = option(
        "", "prompt tuning: text whose embeddings are the initial values; empty: random values"
    )
    encoder_reparameterization_type: str = option(
        "MLP", "P-Tuning: network of the prompt encoder, MLP or LSTM", choices=("MLP", "LSTM")
    )
    encoder_num_layers: int = option(2, "P-Tuning: number of LSTM layers", minimum=1)
    prefix_projection: bool = option(False, "prefix: compute prefixes with a two-layer network")
    encoder_hidden_size: int = option(
        128, "P-Tuning, prefix: hidden size of the network that computes virtual tokens", minimum=1
    )
    placement: str = option(
        "pfeiffer",
        "bottleneck: houlsby (after the attention and the feed-forward sublayer), pfeiffer (after "
        "the feed-forward sublayer) or parallel (parallel to the feed-forward sublayer)",
        choices=PLACEMENTS,
    )
    reduction_factor: float = option(
        16.0,
        "bottleneck: ratio of the model's hidden size to that of the bottleneck",
        minimum=0.001,
    )
    activation: str = option("relu", "bottleneck: activation function: relu, silu, gelu, …")
    scaling: float = option(1.0, "bottleneck: factor on its output")
    init_from: str = option(
        "",
        "PEFT adapter to start from; its settings replace those of the config, except "
        "adapter.dropout",
    )
