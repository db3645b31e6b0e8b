"""The dense architectures, llama, qwen2 and qwen3: from config.json to layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtune.errors import JaxtuneError
from jaxtune.layers.attention import Attention
from jaxtune.layers.decoder import CausalLM, Decoder, DecoderLayer
from jaxtune.layers.mlp import MLP
from jaxtune.layers.rope import rope_from_config
from jaxtune.models.hf_config import MOST_LAYERS, MOST_ROTATED, positive, read, size


def build_dense(
    config: Mapping[str, Any],
    *,
    bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    qk_norm: bool,
    default_head_dim: int | None = None,
) -> CausalLM:
    """Builds an abstract model of layers with attention and a gated feed-forward block.

    Args:
      config: the content of config.json.
      bias: whether q, k and v have a bias.
      output_bias: whether o has a bias.
      mlp_bias: whether the feed-forward projections have a bias.
      qk_norm: whether each head of q and k is normalised before the rotary embedding.
      default_head_dim: head_dim if config.json has none; by default hidden_size / heads.

    Raises:
      JaxtuneError: a missing or unsupported setting.
    """
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    kv_heads = size(config, "num_key_value_heads", heads, null=heads)
    if default_head_dim is None:
        head_dim = size(
            config, "head_dim", hidden // heads, null=hidden // heads, most=MOST_ROTATED
        )
    else:
        head_dim = size(config, "head_dim", default_head_dim, most=MOST_ROTATED)
    if heads % kv_heads:
        raise JaxtuneError(
            f"config.json: {heads} attention heads do not divide into {kv_heads} key-value heads"
        )
    ffn, vocab = size(config, "intermediate_size"), size(config, "vocab_size")
    eps = positive(config, "rms_norm_eps", 1e-6, most=1)

    def make_layer() -> DecoderLayer:
        attention = Attention(
            hidden,
            heads,
            kv_heads,
            head_dim,
            bias=bias,
            output_bias=output_bias,
            qk_norm_eps=eps if qk_norm else None,
        )
        return DecoderLayer(hidden, eps, attention, MLP(hidden, ffn, bias=mlp_bias))

    layers = size(config, "num_hidden_layers", most=MOST_LAYERS)
    rope = rope_from_config(config, head_dim)
    decoder = Decoder(vocab, hidden, eps, rope, [(make_layer, layers)])
    return CausalLM(decoder, vocab, hidden, read(config, "tie_word_embeddings", bool, False))
