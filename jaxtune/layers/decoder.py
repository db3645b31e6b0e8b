"""The decoder that every architecture shares: embedding, runs of stacked layers, norm, head.

An architecture decides what a layer is made of; this file scans over the layers. Layers of equal
structure that follow one another form a run, which is one ``lax.scan``.
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
from jaxtune.layers.cpu_bfloat16 import from_bits
from jaxtune.layers.embedding import Embedding
from jaxtune.layers.experts.moe import MoE
from jaxtune.layers.experts.routing_stats import Routed
from jaxtune.layers.head import Head
from jaxtune.layers.linear import Edit, Linear
from jaxtune.layers.norm import RMSNorm
from jaxtune.layers.remat import remat as remat_body
from jaxtune.layers.rope import Rope
from jaxtune.layers.tree import Shared, stack
from jaxtune.parallel.rules import constrain


class ForwardOptions(NamedTuple):
    """How a forward pass computes: without a random key nothing here changes what it computes.

    Attributes:
      dtype: compute dtype.
      attention: attention backend.
      remat: rematerialisation policy.
      platform: of the devices: "cpu", "gpu" or "tpu".
      neftune_alpha: size of the noise on the embeddings that a random key brings; see `_noisy`.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    platform: str = "cpu"
    neftune_alpha: float = 0.0

    @property
    def residual_dtype(self) -> Any:
        """Dtype of the residual stream.

        XLA's CPU backend has no bfloat16 update of a slice: it would convert the whole stack of
        saved layer inputs, there and back, for every layer that adds one. Float16 ends at 65504,
        which the stream of some models passes.
        """
        wide = self.platform == "cpu" or self.dtype == jnp.float16
        return jnp.float32 if wide else self.dtype

    @property
    def tokens_per_chunk(self) -> int:
        """How many tokens' logits the loss holds at a time: enough to keep the device busy."""
        return 256 if self.platform == "cpu" else 512


class DecoderLayer(nnx.Module):
    """A pre-norm layer: attention, then feed-forward, each added to the residual stream.

    The two adapter slots hold what a method adds to the output of either block.
    """

    def __init__(self, hidden_size: int, eps: float, self_attn: Any, mlp: Any):
        self.input_layernorm = RMSNorm(hidden_size, eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(hidden_size, eps)
        self.mlp = mlp
        self.attention_adapters: Any = nnx.data(None)
        self.output_adapters: Any = nnx.data(None)

    def __call__(
        self, x: jax.Array, context: Context, cache: Cache | None, layer: jax.Array
    ) -> tuple[jax.Array, Cache | None, Routed | None]:
        """Maps x [B, T, hidden] and the run's cache to the same; says how a mixture routed it."""
        h = self.input_layernorm(x, context.dtype)
        h, cache = self.self_attn(h, context, cache, layer)
        x = x + _adapted(self.attention_adapters, h, x, context)
        h, routed = self.post_attention_layernorm(x, context.dtype), None
        if isinstance(self.mlp, MoE):
            h, routed = self.mlp.with_routing(h, context)
        else:
            h = self.mlp(h, context)
        x = x + _adapted(self.output_adapters, h, x, context)
        return constrain(x, "batch", "sequence", "hidden"), cache, routed


def _adapted(adapter: Any, h: jax.Array, x: jax.Array, context: Context) -> jax.Array:
    """Returns the output h of a block whose input came from the stream x, with its adapter's."""
    return h if adapter is None else h + adapter(h, x, context)


class Decoder(nnx.Module):
    """Embedding, layers and the last norm.

    Attributes:
      prompt: slot of a method: called with a random key or None, it returns the embeddings
        [n, hidden] of virtual tokens, which take the first n positions of every segment.
      prefix: slot of a method: `virtual_tokens` of it come before every segment, as keys and
        values that the layers hold; called, it returns what these are made from, or None.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        eps: float,
        rope: Rope,
        runs: Sequence[tuple[Callable[[], DecoderLayer], int]],
    ):
        self.rope = rope
        self.embed_tokens = Embedding(vocab_size, hidden_size)
        counts = [count for _, count in runs]
        self.run_layers = tuple((sum(counts[:i]), count) for i, count in enumerate(counts))
        self.layers = nnx.List(
            [
                stack(make(), *layers)
                for (make, _), layers in zip(runs, self.run_layers, strict=True)
            ]
        )
        self.norm = RMSNorm(hidden_size, eps)
        self.prompt: Any = nnx.data(None)
        self.prefix: Any = nnx.data(None)

    @property
    def reserved(self) -> int:
        """Positions at the head of every segment whose tokens do not matter."""
        return 0 if self.prompt is None else self.prompt.virtual_tokens

    def split_runs(self, starts: Collection[int]) -> None:
        """Begins another run at each of these layers; the module has to be abstract still."""
        layers, runs = [], []
        for module, (first, count) in zip(self.layers, self.run_layers, strict=True):
            within = sorted(start for start in starts if first < start < first + count)
            for begin, end in itertools.pairwise([first, *within, first + count]):
                layers.append(stack(nnx.clone(module), begin, end - begin))
                runs.append((begin, end - begin))
        self.layers, self.run_layers = nnx.List(layers), tuple(runs)

    def init_cache(self, batch: int, length: int, dtype: DTypeLike) -> list[Cache]:
        """Returns an empty cache for each run of layers: arrays [layers, B, length, …]."""
        return [
            {
                name: jnp.zeros((count, *shape), dtype)
                for name, shape in run.self_attn.cache_shapes(batch, length).items()
            }
            for run, (_, count) in zip(self.layers, self.run_layers, strict=True)
        ]

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        options: ForwardOptions,
        key: jax.Array | None = None,
        caches: list[Cache] | None = None,
        kv_segment_ids: jax.Array | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, list[Cache] | None, Routed | None]:
        """Runs the decoder; arguments as in `CausalLM.hidden`.

        Returns:
          (normalised hidden states [B, T, hidden], updated caches, the routing of every mixture
          of experts with a leading axis of layers, or None where there is none).
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
        if self.prompt is not None and tokens.shape[1] > 1:  # decoding is past the prompt
            x = _with_prompt(x, self.prompt(key), positions, segment_ids)
        x = constrain(x, "batch", "sequence", "hidden")
        updated: list[Cache] = []
        routings: list[Routed] = []
        for run, (first, count) in enumerate(self.run_layers):
            cache = None if caches is None else caches[run]
            x, cache, routed = _scan(self.layers[run], x, context, cache, (first, count), options)
            if cache is not None:
                updated.append(cache)
            if routed is not None:
                routings.append(routed)
        routing = None
        if routings:
            routing = jax.tree.map(lambda *runs: jnp.concatenate(runs), *routings)
        return self.norm(x, options.dtype), updated or None, routing


def _noisy(x: jax.Array, segment_ids: jax.Array, alpha: float, key: jax.Array) -> jax.Array:
    """Adds uniform noise to embeddings x [B, T, hidden], of the same norm for every example.

    It is of at most alpha / √(tokens of the example · hidden), so that packing changes none of it
    but its draw.

    Source: Jain et al., 2023 (NEFTune).
    """

    def lengths(row: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(jnp.ones_like(row), row, row.shape[0] + 1)[row]

    size = jnp.maximum(jax.vmap(lengths)(segment_ids), 1) * x.shape[-1]
    # Layers and prompts fold small numbers into the key: this one is out of their way.
    noise = jax.random.uniform(jax.random.fold_in(key, 2**31 - 1), x.shape, minval=-1, maxval=1)
    bound = alpha / jnp.sqrt(size.astype(jnp.float32))[..., None]
    return x + jnp.where(segment_ids[..., None] != 0, noise * bound, 0).astype(x.dtype)


def _with_prompt(
    x: jax.Array, prompt: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Puts the rows of prompt [n, hidden] at positions 0 to n - 1 of each segment of x."""
    # A product with zeros and ones picks rows exactly, and its transpose sums in a fixed order.
    pick = jax.nn.one_hot(positions, prompt.shape[0], dtype=prompt.dtype)
    rows = jnp.matmul(pick, prompt, precision=lax.Precision.HIGHEST).astype(x.dtype)
    virtual = (positions < prompt.shape[0]) & (segment_ids != 0)
    return jnp.where(virtual[..., None], rows, x)


def _scan(
    layers: nnx.Module,
    x: jax.Array,
    context: Context,
    cache: Cache | None,
    run: tuple[int, int],
    options: ForwardOptions,
) -> tuple[jax.Array, Cache | None, Routed | None]:
    """Applies a stacked run of layers, given as (first layer, count), one after the other."""
    graphdef, shared, state = nnx.split(layers, Shared, ...)

    def body(carry: Any, xs: Any) -> tuple[Any, Routed | None]:
        (x, cache), (layer_state, index) = carry, xs
        layer = nnx.merge(graphdef, shared, from_bits(layer_state))
        x, cache, routed = layer(x, context.in_layer(run[0] + index), cache, index)
        return (x, cache), routed

    xs = (state, jnp.arange(run[1]))
    (x, cache), routed = lax.scan(remat_body(body, options.remat), (x, cache), xs)
    return x, cache, routed


class CausalLM(nnx.Module):
    """A decoder with a head that gives the next token's logits.

    Attributes:
      lm_head_rows: slot of a method that trains some rows of an untied head.
    """

    def __init__(self, model: Decoder, vocab_size: int, hidden_size: int, tied: bool):
        self.model = model
        head = None if tied else Linear(hidden_size, vocab_size, axes=("vocab", "embed"))
        self.lm_head = nnx.data(head)
        self.lm_head_rows: Any = nnx.data(None)

    def hidden(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        options: ForwardOptions,
        *,
        key: jax.Array | None = None,
        caches: list[Cache] | None = None,
        kv_segment_ids: jax.Array | None = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, list[Cache] | None]:
        """Runs everything but the head.

        Args:
          tokens: int[B, T].
          segment_ids: int[B, T]; tokens attend within their segment, 0 is padding.
          positions: int[B, T]; of each token within its segment, virtual tokens of a prompt
            counted and those of a prefix not.
          options: compute dtype, attention backend, rematerialisation.
          key: for dropout; None turns it off.
          caches: from `Decoder.init_cache`, when generating.
          kv_segment_ids: int[B, S] of the cached tokens, these included.
          cache_index: where these tokens go in the cache.

        Returns:
          (normalised hidden states [B, T, hidden], updated caches).
        """
        hidden, caches, _ = self.model(
            tokens, segment_ids, positions, options, key, caches, kv_segment_ids, cache_index
        )
        return hidden, caches

    def hidden_with_routing(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        options: ForwardOptions,
        *,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Routed | None]:
        """Runs everything but the head, without a cache; arguments as in `hidden`.

        Returns:
          (normalised hidden states [B, T, hidden], the routing of every mixture of experts with
          a leading axis of layers, or None where there is none).
        """
        hidden, _, routing = self.model(tokens, segment_ids, positions, options, key)
        return hidden, routing

    def head(self) -> Head:
        """Returns what turns hidden states into logits: the embedding where it is tied."""
        trained = self.model.embed_tokens.adapter if self.lm_head is None else self.lm_head_rows
        rows = None if trained is None else trained.rows()
        if self.lm_head is None:
            return Head(self.model.embed_tokens.weight.get_value(), rows=rows)
        weight, bias = self.lm_head.frozen
        adapter = self.lm_head.adapter
        dtype = getattr(weight, "dtype", jnp.float32)
        edit = Edit() if adapter is None else adapter.edit(weight, bias, dtype)
        return Head(weight, edit, rows)
