"""DeepSeek's mixtures of experts: from config.json to layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM, Decoder, DecoderLayer
from jaxtune.layers.experts.moe import MoE, Routing
from jaxtune.layers.mla import MLA, MLASizes
from jaxtune.layers.mlp import MLP
from jaxtune.layers.rope import rope_from_config, yarn_softmax_scale
from jaxtune.models.hf_config import MOST_LAYERS, MOST_ROTATED, positive, read, require, size

MOST_EXPERTS = 10_000  # of a layer
MOST_NAMES = 2**18  # experts of all layers; each has three weights, with names of their own
MOST_SCALE = 1000.0  # factor on the weights of routed experts


def build_mixture(
    config: Mapping[str, Any], make_attention: Callable[[], Any], rotary_dim: int, routing: Routing
) -> CausalLM:
    """Builds an abstract model of dense layers followed by mixtures of experts.

    Args:
      config: the content of config.json.
      make_attention: returns the attention of a layer.
      rotary_dim: number of rotated dimensions per head.
      routing: routing of the mixtures.
    """
    hidden, vocab = size(config, "hidden_size"), size(config, "vocab_size")
    ffn, expert_ffn = size(config, "intermediate_size"), size(config, "moe_intermediate_size")
    shared = size(config, "n_shared_experts", 0, null=0, least=0, most=MOST_EXPERTS)
    eps = positive(config, "rms_norm_eps", 1e-6, most=1)
    layers = size(config, "num_hidden_layers", most=MOST_LAYERS)
    dense = read(config, "first_k_dense_replace", int, 0)
    every = size(config, "moe_layer_freq", 1, null=1)
    check_routing(routing)
    if layers * routing.experts > MOST_NAMES:
        raise JaxtuneError(
            f'config.json: "num_hidden_layers"={layers} times "n_routed_experts"={routing.experts} '
            f"is more than {MOST_NAMES:,}"
        )

    def make_dense() -> DecoderLayer:
        return DecoderLayer(hidden, eps, make_attention(), MLP(hidden, ffn))

    def make_mixture() -> DecoderLayer:
        mixture = MoE(hidden, expert_ffn, routing, shared)
        return DecoderLayer(hidden, eps, make_attention(), mixture)

    # Consecutive layers of one kind form a block.
    blocks: list[tuple[Callable[[], DecoderLayer], int]] = []
    for layer in range(layers):
        make = make_mixture if layer >= dense and layer % every == 0 else make_dense
        if blocks and blocks[-1][0] is make:
            blocks[-1] = (make, blocks[-1][1] + 1)
        else:
            blocks.append((make, 1))
    decoder = Decoder(vocab, hidden, eps, rope_from_config(config, rotary_dim), blocks)
    return CausalLM(decoder, vocab, hidden, read(config, "tie_word_embeddings", bool, False))


def check_routing(routing: Routing) -> None:
    """Checks the sizes of a routing.

    Raises:
      JaxtuneError: sizes that contradict each other; the message names their keys.
    """
    experts, groups, per_group = routing.experts, routing.groups, routing.experts // routing.groups
    problem = ""
    if experts % groups:
        problem = f'"n_routed_experts" is {experts}, not a multiple of "n_group"={groups}'
    elif routing.top_groups > groups:
        problem = f'"topk_group" is {routing.top_groups}, more than "n_group"={groups}'
    elif groups > 1 and routing.group_top > per_group:
        problem = (
            f'"n_group"={groups} makes groups of {per_group} experts, and at least '
            f"{routing.group_top} are needed"
        )
    elif routing.top_k > experts:
        problem = f'"num_experts_per_tok" is {routing.top_k}; "n_routed_experts" is {experts}'
    elif routing.top_k > routing.top_groups * per_group:
        problem = (
            f'"num_experts_per_tok" is {routing.top_k}, and "topk_group"={routing.top_groups} '
            f"groups have {routing.top_groups * per_group} experts"
        )
    if problem:
        raise JaxtuneError(f"config.json: {problem}")


def latent_attention(
    config: Mapping[str, Any], *, interleaved: bool = True
) -> tuple[Callable[[], MLA], int]:
    """Returns a constructor of latent attention, and its number of rotated dimensions.

    Args:
      config: the content of config.json.
      interleaved: whether rotated pairs are (2i, 2i + 1) instead of (i, i + dim / 2).
    """
    nope, rope = (
        size(config, "qk_nope_head_dim"),
        size(config, "qk_rope_head_dim", most=MOST_ROTATED),
    )
    q_lora, heads = config.get("q_lora_rank"), size(config, "num_attention_heads")
    # transformers has as many key-value heads as heads, and rotates `head_dim` dimensions.
    require(config, "num_key_value_heads", (None, heads))
    require(config, "head_dim", (None, rope))
    sizes = MLASizes(
        hidden=size(config, "hidden_size"),
        heads=heads,
        q_lora=None if q_lora is None else size(config, "q_lora_rank"),
        kv_lora=size(config, "kv_lora_rank"),
        nope=nope,
        rope=rope,
        v=size(config, "v_head_dim"),
        scale=(nope + rope) ** -0.5 * yarn_softmax_scale(config),
        bias=read(config, "attention_bias", bool, False),
        interleaved=interleaved,
    )
    return lambda: MLA(sizes), rope
