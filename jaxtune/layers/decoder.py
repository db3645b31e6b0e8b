"""The decoder that every architecture shares: embedding, blocks of stacked layers, norm, head.

An architecture chooses the parts of a layer; this file scans over the layers. Consecutive layers of
equal structure are stacked as blocks, which one ``lax.scan`` applies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxtune.layers.context import Cache, Context
from jaxtune.layers.cpu_bfloat16 import decode, stored_dtype
from jaxtune.layers.embedding import Embedding
from jaxtune.layers.experts.moe import MoE
from jaxtune.layers.experts.routing_stats import Routed
from jaxtune.layers.head import Head
from jaxtune.layers.linear import Edit, Linear, Projection
from jaxtune.layers.noise import fold_in, single_key, uniform
from jaxtune.layers.norm import RMSNorm
from jaxtune.layers.remat import remat as remat_body
from jaxtune.layers.rope import Rope
from jaxtune.layers.tree import Path, Shared, stack
from jaxtune.parallel.rules import constrain


class ForwardOptions(NamedTuple):
    """Options of a forward pass. Without a random key none of them changes its mathematics.

    Attributes:
      dtype: compute dtype.
      attention: attention backend.
      remat: rematerialisation policy.
      platform: platform of the devices: "cpu", "gpu" or "tpu".
      neftune_alpha: size of the noise on the embeddings, with a random key; see `_noisy`.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    platform: str = "cpu"
    neftune_alpha: float = 0.0

    @property
    def residual_dtype(self) -> Any:
        """Dtype of the residual stream.

        float32 on a CPU, where XLA has no bfloat16 update of a slice and would convert the whole
        stack of saved layer inputs for every layer that writes to it; and for float16, whose range
        ends at 65504, which the stream of some models exceeds.
        """
        wide = self.platform == "cpu" or self.dtype == jnp.float16
        return jnp.float32 if wide else self.dtype

    @property
    def cache_dtype(self) -> Any:
        """Dtype of the key-value cache: the compute dtype, or its bits; see `cpu_bfloat16`."""
        return stored_dtype(self.dtype, self.platform)

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens whose logits the loss holds at a time: enough to keep the device busy."""
        return 256 if self.platform == "cpu" else 512


class DecoderLayer(nnx.Module):
    """A pre-norm layer: attention, then feed-forward, each added to the residual stream.

    Attributes:
      attention_adapters: slot for a module whose output is added to that of attention.
      output_adapters: slot for a module whose output is added to that of the feed-forward block.
    """

    def __init__(self, hidden_size: int, eps: float, self_attn: Any, mlp: Any):
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = mlp
        self.attention_adapters: Any = nnx.data(None)
        self.output_adapters: Any = nnx.data(None)

    @property
    def mixture(self) -> MoE | None:
        """The mixture of experts; None where the feed-forward block is dense."""
        return self.mlp if isinstance(self.mlp, MoE) else None

    @property
    def activation_widths(self) -> dict[str, int]:
        """Values per token within the layer, by activation: "out", "qkv" and "mlp"."""
        return self.self_attn.activation_widths | {"mlp": self.mlp.activation_width}

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None, Routed | None]:
        """Applies the layer.

        Args:
          x: [B, T, hidden].
          context: positions, segments and options of the pass.
          cache: cache of the block, [layers, B, S, …] per array.
          layer: index of the layer within its block, an int scalar.

        Returns:
          ([B, T, hidden], the updated cache, the routing of a mixture or None).
        """
        h = self.input_layernorm(x, context.dtype)
        h, cache = self.self_attn(h, context, cache, layer)
        x = x + _adapted(self.attention_adapters, h, x, context)
        h, routed = self.post_attention_layernorm(x, context.dtype), None
        if self.mixture is not None:
            h, routed = self.mixture.with_routing(h, context)
        else:
            h = self.mlp(h, context)
        x = x + _adapted(self.output_adapters, h, x, context)
        return constrain(x, "batch", "sequence", "hidden"), cache, routed


def _adapted(adapter: Any, h: jax.Array, x: jax.Array, context: Context) -> jax.Array:
    """Adds an adapter's output to the output h of a sublayer that read the stream x."""
    return h if adapter is None else h + adapter(h, x, context)


class Blocks(NamedTuple):
    """A block: consecutive layers of equal structure.

    Attributes:
      layer: module of one layer, whose arrays have a leading axis of `count`.
      first: number of the first layer.
      count: number of layers.
    """

    layer: DecoderLayer
    first: int
    count: int


class Decoder(nnx.Module):
    """Embedding, layers and the last norm.

    Attributes:
      layers: the stacked layers; see `blocks`.
      block_layers: (first layer, count) of each of `layers`.
      prompt: slot for virtual tokens: a module that maps a random key or None to the embeddings
        [n, hidden] of the first n positions of every segment.
      prefix: slot for the part of a prefix that layers share: a module that returns the array from
        which each layer's attention computes its `virtual_tokens` keys and values, or None if each
        layer holds its own.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        eps: float,
        rope: Rope,
        blocks: Sequence[tuple[Callable[[], DecoderLayer], int]],
    ):
        """Builds the abstract module.

        Args:
          vocab_size: rows of the embedding.
          hidden_size: width of the residual stream.
          eps: epsilon of the last norm.
          rope: rotary embedding of all layers.
          blocks: (constructor of a layer, number of layers) for each block.
        """
        self.rope = rope
        self.embed_tokens = Embedding(vocab_size, hidden_size)
        counts = [count for _, count in blocks]
        self.block_layers = tuple((sum(counts[:i]), count) for i, count in enumerate(counts))
        self.layers = nnx.List(
            [
                stack(make(), *layers)
                for (make, _), layers in zip(blocks, self.block_layers, strict=True)
            ]
        )
        self.norm = RMSNorm(hidden_size, eps)
        self.prompt: Any = nnx.data(None)
        self.prefix: Any = nnx.data(None)

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """The blocks in order."""
        pairs = zip(self.layers, self.block_layers, strict=True)
        return tuple(Blocks(layer, first, count) for layer, (first, count) in pairs)

    @property
    def reserved(self) -> int:
        """Number of positions at the start of every segment that virtual tokens occupy."""
        return 0 if self.prompt is None else self.prompt.virtual_tokens

    def split_blocks(self, starts: Collection[int]) -> None:
        """Splits blocks of an abstract module so that each of the given layers begins a block."""
        layers, spans = [], []
        for layer, first, count in self.blocks:
            within = sorted(start for start in starts if first < start < first + count)
            for begin, end in itertools.pairwise([first, *within, first + count]):
                layers.append(stack(nnx.clone(layer), begin, end - begin))
                spans.append((begin, end - begin))
        self.layers, self.block_layers = nnx.List(layers), tuple(spans)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> list[Cache]:
        """Returns an empty cache for each block: arrays [layers, B, length, …]."""
        return [
            {
                name: jnp.zeros((count, *shape), dtype)
                for name, shape in layer.self_attn.cache_shapes(batch, length).items()
            }
            for layer, _, count in self.blocks
        ]

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        options: ForwardOptions,
        key: jax.Array | None = None,
        *,
        caches: list[Cache] | None = None,
        kv_segment_ids: jax.Array | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, list[Cache] | None, Routed | None]:
        """Runs everything but the head.

        Args:
          tokens: int[B, T].
          segment_ids: int[B, T]; tokens attend within their segment, 0 is padding.
          positions: int[B, T]; position of each token within its segment. It counts the virtual
            tokens of a prompt and not those of a prefix.
          options: compute dtype, attention backend, rematerialisation.
          key: for dropout and noise, a scalar or one of each row [B]; None turns them off.
          caches: from `init_cache`, for generation.
          kv_segment_ids: int[B, S] of the cached tokens, these included.
          cache_index: index in the cache of the first of these tokens.

        Returns:
          (normalised hidden states [B, T, hidden], updated caches, the routing of every mixture of
          experts with a leading axis of layers, or None without a mixture).
        """
        before = 0 if self.prefix is None else self.prefix.virtual_tokens
        cos, sin = self.rope.angles(positions + before)
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        context = Context(
            cos,
            sin,
            segment_ids,
            kv_segment_ids,
            cache_index,
            key,
            options.attention,
            options.dtype,
            options.platform,
            None if self.prefix is None else self.prefix(),
        )
        x = self.embed_tokens(tokens, options.residual_dtype)
        if options.neftune_alpha and key is not None:
            x = _noisy(x, segment_ids, options.neftune_alpha, key)
        if self.prompt is not None and tokens.shape[1] > 1:  # single-token decoding is past it
            prompt = self.prompt(None if key is None else single_key(key))
            x = _with_prompt(x, prompt, positions, segment_ids)
        x = constrain(x, "batch", "sequence", "hidden")
        updated: list[Cache] = []
        routings: list[Routed] = []
        for index, blocks in enumerate(self.blocks):
            cache = None if caches is None else caches[index]
            x, cache, routed = _scan(blocks, x, context, cache, options)
            if cache is not None:
                updated.append(cache)
            if routed is not None:
                routings.append(routed)
        routing = None
        if routings:
            routing = jax.tree.map(lambda *parts: jnp.concatenate(parts), *routings)
        return self.norm(x, options.dtype), updated or None, routing


def constrain_caches(caches: Sequence[Cache], blocks: Sequence[Blocks]) -> list[Cache]:
    """Constrains the sharding of the blocks' caches: rows as in a batch, heads as in attention."""
    return [
        {
            name: constrain(cache[name], "layers", "batch", None, *axes)
            for name, axes in layer.self_attn.token_axes.items()
        }
        for (layer, _, _), cache in zip(blocks, caches, strict=True)
    ]


def _noisy(x: jax.Array, segment_ids: jax.Array, alpha: float, key: jax.Array) -> jax.Array:
    """Adds uniform noise to embeddings x [B, T, hidden], with the same expected norm per example.

    The noise is within ±alpha / √(tokens of the example · hidden). Packing changes the random draw
    but not the distribution.

    Source: Jain et al., 2023 (NEFTune).
    """

    def lengths(row: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(jnp.ones_like(row), row, row.shape[0] + 1)[row]

    size = jnp.maximum(jax.vmap(lengths)(segment_ids), 1) * x.shape[-1]
    # Layers and prompts fold small numbers into the key; this one never coincides with theirs.
    noise = uniform(fold_in(key, 2**31 - 1), x.shape)
    bound = alpha / jnp.sqrt(size.astype(jnp.float32))[..., None]
    return x + jnp.where(segment_ids[..., None] != 0, noise * bound, 0).astype(x.dtype)


def _with_prompt(
    x: jax.Array, prompt: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Writes the rows of prompt [n, hidden] to positions 0 to n - 1 of each segment of x."""
    # A product with a one-hot matrix [B, T, n] selects rows exactly, and its transpose sums the
    # gradient in a fixed order; the transpose of a gather is a scatter-add without a fixed order.
    pick = jax.nn.one_hot(positions, prompt.shape[0], dtype=prompt.dtype)
    rows = jnp.matmul(pick, prompt, precision=lax.Precision.HIGHEST).astype(x.dtype)
    virtual = (positions < prompt.shape[0]) & (segment_ids != 0)
    return jnp.where(virtual[..., None], rows, x)


def _scan(
    blocks: Blocks,
    x: jax.Array,
    context: Context,
    cache: Cache | None,
    options: ForwardOptions,
) -> tuple[jax.Array, Cache | None, Routed | None]:
    """Applies the layers of a block to x [B, T, hidden] with one `lax.scan`.

    The state of the layer's module, [layers, …] per array, is scanned over: each iteration merges
    one layer's slices into a module (this is where the trees meet the abstract model) and calls it.
    Constants that all layers share (`Shared`) are closed over, and the cache, which all layers
    update in place, is carried.
    """
    graphdef, shared, state = nnx.split(blocks.layer, Shared, ...)

    def body(carry: Any, xs: Any) -> tuple[Any, Routed | None]:
        (x, cache), (layer_state, index) = carry, xs
        layer = nnx.merge(graphdef, shared, decode(layer_state))
        x, cache, routed = layer(x, context.in_layer(blocks.first + index), cache, index)
        return (x, cache), routed

    xs = (state, jnp.arange(blocks.count))
    (x, cache), routed = lax.scan(remat_body(body, options.remat), (x, cache), xs)
    return x, cache, routed


class CausalLM(nnx.Module):
    """A decoder with a head that gives the next token's logits.

    Attributes:
      model: the decoder, under its name in checkpoints; see `decoder`.
      vocab_size: number of tokens in the vocabulary.
      hidden_size: width of the residual stream.
      lm_head: the projection to logits; None if the head is tied to the embedding.
      lm_head_rows: slot for trained rows of an untied head.
    """

    def __init__(self, model: Decoder, vocab_size: int, hidden_size: int, tied: bool):
        self.model = model
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        head = None if tied else Linear(hidden_size, vocab_size, axes=("vocab", "embed"))
        self.lm_head = nnx.data(head)
        self.lm_head_rows: Any = nnx.data(None)

    @property
    def decoder(self) -> Decoder:
        """Everything but the head."""
        return self.model

    def projections(self) -> dict[Path, Projection]:
        """Returns every projection by path, routers included, with one entry per block."""
        return {
            tuple(str(part) for part in path): module
            for path, module in nnx.iter_modules(self)
            if isinstance(module, Projection)
        }

    def head(self) -> Head:
        """Returns the function from hidden states to logits; a tied head is the embedding."""
        trained = self.model.embed_tokens.adapter if self.lm_head is None else self.lm_head_rows
        rows = None if trained is None else trained.rows()
        if self.lm_head is None:
            return Head(self.model.embed_tokens.weight.get_value(), rows=rows)
        weight, bias = self.lm_head.frozen
        adapter = self.lm_head.adapter
        dtype = getattr(weight, "dtype", jnp.float32)
        edit = Edit() if adapter is None else adapter.edit(weight, bias, dtype)
        return Head(weight, edit, rows)
