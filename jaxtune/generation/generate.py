"""Generation: prefill and decode in one compiled function, with a key-value cache.

Prompts are padded on the left, so that all rows write their next token at the same cache index. One
forward pass over the prompts fills indices 0 … P − 1 of the caches and gives the first new token.
Each iteration of a while loop then feeds the last token back, writes its keys and values at index
P + i − 1 and generates token i, until all rows are done or N tokens are generated. All shapes are
static, so calls with the same B, P and N share one compilation.

Legend: B is the number of prompts, P their padded length, N the maximum number of new tokens, V the
vocabulary size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.errors import JaxtuneError
from jaxtune.layers.cpu_bfloat16 import jit
from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.parallel.rules import constrain
from jaxtune.vocabulary import check_token_ids

# Prompt lengths are rounded up to a multiple of this, so that similar batches share a compilation.
PROMPT_MULTIPLE = 32
_SEEDS = 2**31  # bound of int32, the dtype of seeds in JAX


class Sampling(NamedTuple):
    """Settings for choosing the next token.

    Attributes:
      temperature: sampling temperature; 0 decodes greedily.
      top_p: minimum total probability of the smallest set of tokens to sample from.
      seed: random seed.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class _Loop(NamedTuple):
    """The carry of the decoding loop.

    Attributes:
      index: int32 scalar, number of tokens generated so far.
      token: int32[B], token generated last.
      done: bool[B], whether a row has generated a stop token.
      output: int32[B, N], generated tokens.
      caches: key-value caches of all layers, of P + N positions.
      key: random key of the call; the key of a step is folded in from its index.
    """

    index: jax.Array
    token: jax.Array
    done: jax.Array
    output: jax.Array
    caches: Any
    key: jax.Array


def _choose(logits: jax.Array, greedy: bool, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Returns the next token of each row, int32[B], from logits float32[B, V].

    With top_p, the logits are sorted in descending order; the tokens whose predecessors have a
    total probability below top_p form the smallest sufficient set, and the logit of its last member
    is the threshold below which all others are masked.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The token that crosses top_p is included, and so is the most likely one: nothing precedes it.
    smallest = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1)
    logits = jnp.where(logits >= smallest[:, None], logits, -jnp.inf)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


@functools.partial(
    jit, static_argnames=("definition", "options", "max_new_tokens", "greedy", "stop")
)
def _generate(
    trees: tuple[Tree, Tree, Tree],
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    *,
    definition: Definition,
    options: ForwardOptions,
    max_new_tokens: int,
    greedy: bool,
    stop: tuple[int, ...],
) -> jax.Array:
    """Returns the new tokens, int32[B, N]; a row is filled up with the first stop token (or −1).

    Args:
      trees, definition, options, max_new_tokens, stop: those of `generate_tokens`.
      tokens: int32[B, P], prompts padded on the left.
      lengths: int32[B], number of tokens of each prompt.
      sampling: settings; they are traced, so that other values share the compilation.
      greedy: whether the most likely token is chosen.
    """
    model: CausalLM = definition.bind(*trees)
    batch, prompt = tokens.shape
    tokens = constrain(tokens, "batch", None)
    # Prompts end at the same index, so padding is on the left and has segment 0. Positions count
    # from 0 at the first token of each prompt; the cache index counts from the start of the row.
    index = jnp.arange(prompt)
    segments = (index >= prompt - lengths[:, None]).astype(jnp.int32)
    positions = jnp.maximum(index - (prompt - lengths[:, None]), 0)
    # [B, P + N]: new tokens belong to segment 1 like the prompt. The causal mask excludes those not
    # generated yet, whose cache index is larger than that of the query.
    kv_segments = jnp.concatenate([segments, jnp.ones((batch, max_new_tokens), jnp.int32)], axis=1)
    caches = model.decoder.init_cache(batch, prompt + max_new_tokens, options.dtype)
    hidden, caches, _ = model.decoder(
        tokens, segments, positions, options, caches=caches, kv_segment_ids=kv_segments
    )
    end = jnp.asarray(stop, jnp.int32)

    # A finished row is filled with the stop token until all rows are finished.
    def choose(hidden: jax.Array, key: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = _choose(model.head()(hidden[:, -1]), greedy, sampling, key)
        token = jnp.where(done, stop[0] if stop else -1, token)
        return token, done | jnp.isin(token, end)

    key = jax.random.key(sampling.seed)
    token, done = choose(hidden, jax.random.fold_in(key, 0), jnp.zeros(batch, bool))
    output = jnp.full((batch, max_new_tokens), stop[0] if stop else -1, jnp.int32)
    loop = _Loop(jnp.int32(1), token, done, output.at[:, 0].set(token), caches, key)

    def one_token(loop: _Loop) -> _Loop:
        hidden, caches, _ = model.decoder(
            loop.token[:, None],
            jnp.ones((batch, 1), jnp.int32),
            (lengths + loop.index - 1)[:, None],
            options,
            caches=loop.caches,
            kv_segment_ids=kv_segments,
            cache_index=prompt + loop.index - 1,
        )
        key = jax.random.fold_in(loop.key, loop.index)
        token, done = choose(hidden, key, loop.done)
        output = lax.dynamic_update_slice(loop.output, token[:, None], (0, loop.index))
        return _Loop(loop.index + 1, token, done, output, caches, loop.key)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.index < max_new_tokens) & ~jnp.all(loop.done)

    return lax.while_loop(unfinished, one_token, loop).output


def generate_tokens(
    definition: Definition,
    trees: tuple[Tree, Tree, Tree],
    prompts: Sequence[Sequence[int]],
    options: ForwardOptions,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int],
) -> list[list[int]]:
    """Continues a batch of prompts of any lengths.

    Args:
      definition: definition of the model.
      trees: base, trainable, constants.
      prompts: token ids, at least one each.
      options: compute dtype and attention backend.
      max_new_tokens: maximum number of new tokens per prompt.
      sampling: settings for choosing tokens.
      stop: token ids that end an answer.

    Returns:
      The ids of the new tokens of each prompt, without the stop token.

    Raises:
      JaxtuneError: an empty prompt, ids outside the vocabulary, or settings out of range.
    """
    if not len(prompts):
        return []
    _check(definition, prompts, max_new_tokens, sampling, stop)
    reserved = [0] * definition.reserved
    prompts = [[*reserved, *prompt] for prompt in prompts]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-int(lengths.max()) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    stop = tuple(sorted(set(stop)))
    output = np.asarray(
        _generate(
            trees,
            tokens,
            lengths,
            sampling,
            definition=definition,
            options=options,
            max_new_tokens=max_new_tokens,
            greedy=sampling.temperature == 0,
            stop=stop,
        )
    )
    return [_until_stop(row.tolist(), stop) for row in output]


def _check(
    definition: Definition,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int],
) -> None:
    """Raises if an argument of `generate_tokens` is out of range."""
    for index, prompt in enumerate(prompts):
        check_token_ids(prompt, definition.vocab_size, f"prompt {index + 1}")
        if np.ndim(prompt) != 1:
            raise JaxtuneError(f"prompt {index + 1} is not a list of token ids")
        if not len(prompt):
            raise JaxtuneError(f"prompt {index + 1} has no tokens")
    # All comparisons with NaN are false, so NaN is rejected as well.
    if (
        max_new_tokens < 1
        or not 0 <= sampling.temperature < math.inf
        or not 0 < sampling.top_p <= 1
    ):
        raise JaxtuneError("max_new_tokens ≥ 1, temperature ≥ 0 and 0 < top_p ≤ 1 are required")
    if not -_SEEDS <= sampling.seed < _SEEDS:
        raise JaxtuneError(f"seed={sampling.seed} is not within {-_SEEDS} and {_SEEDS - 1}")
    check_token_ids(stop, definition.vocab_size, "the tokens that end an answer (eos_token_id)")


def _until_stop(row: list[int], stop: tuple[int, ...]) -> list[int]:
    """Returns the tokens before the first stop token."""
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0]] if ends else row
