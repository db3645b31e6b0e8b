"""Compiled functions of generation: prefill, chunks of decoding, and growth of the cache.

Prompts are padded on the left, so that all rows write their next token at the same cache index. One
forward pass over the prompts fills indices 0 … P − 1 of the caches and gives the first new token.
A chunk then runs up to `CHUNK` iterations of a while loop, each of which feeds the last token back,
writes its keys and values, and chooses the next token; it ends early when all rows are done.

Shapes are the only static arguments: number of rows B, width of the prompts P and capacity of the
caches S. Lengths, limits, end tokens, sampling settings and the number of steps are traced. The
caches are donated, so that a chunk updates them in place.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.generation.sampling import Sampling, choose
from jaxtune.layers.context import Cache
from jaxtune.layers.cpu_bfloat16 import jit
from jaxtune.layers.decoder import CausalLM, ForwardOptions, constrain_caches
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.parallel.rules import constrain

CHUNK = 32  # maximum number of tokens that a chunk adds to a row
NO_TOKEN = -1  # id in the place of a token that a finished row does not get


class State(NamedTuple):
    """Everything that generation continues from.

    Attributes:
      caches: key-value cache of each block, [layers, B, S, …] per array.
      starts: int32[B], cache index of each row's first token; smaller indices are padding.
      index: int32 scalar, cache index of the next token that is fed, the same for all rows.
      token: int32[B], token generated last, which is fed next.
      count: int32 scalar, number of tokens generated so far.
      done: bool[B], whether a row is finished.
    """

    caches: list[Cache]
    starts: jax.Array
    index: jax.Array
    token: jax.Array
    count: jax.Array
    done: jax.Array


class Controls(NamedTuple):
    """Settings of a call, the same for all its chunks.

    Attributes:
      limits: int32[B], maximum number of new tokens of each row; a row with 0 has none.
      end: int32[n], ids that end a row; −1 for unused entries.
      sampling: settings for choosing tokens, as scalars.
    """

    limits: jax.Array | np.ndarray
    end: jax.Array | np.ndarray
    sampling: Sampling


class Chosen(NamedTuple):
    """The tokens that a chunk has chosen.

    Attributes:
      tokens: int32[B, n], with the end token of a row; `NO_TOKEN` after it.
      log_probs: float32[B, n], log-probabilities of these tokens under the model, in nats.
    """

    tokens: jax.Array
    log_probs: jax.Array


@functools.partial(jit, static_argnames=("definition", "options", "capacity"))
def prefill(
    trees: tuple[Tree, Tree, Tree],
    tokens: jax.Array,
    lengths: jax.Array,
    controls: Controls,
    *,
    definition: Definition,
    options: ForwardOptions,
    capacity: int,
) -> tuple[State, Chosen]:
    """Processes the prompts and chooses the first token of each row.

    Args:
      trees: base, trainable, constants.
      tokens: int32[B, P], prompts padded on the left.
      lengths: int32[B], number of tokens of each prompt.
      controls: settings of the call.
      definition: definition of the model.
      options: compute dtype and attention backend.
      capacity: S, at least P.
    """
    model: CausalLM = definition.bind(*trees)
    batch, width = tokens.shape
    tokens = constrain(tokens, "batch", None)
    # Padding has segment 0. Positions count from 0 at the first token of each prompt; the cache
    # index counts from the start of the row.
    starts = width - lengths
    positions = jnp.arange(width) - starts[:, None]
    segments = (positions >= 0).astype(jnp.int32)
    caches = model.decoder.init_cache(batch, capacity, options.cache_dtype)
    hidden, caches, _ = model.decoder(
        tokens,
        segments,
        jnp.maximum(positions, 0),
        options,
        caches=constrain_caches(caches, definition.blocks),
        kv_segment_ids=jnp.pad(segments, ((0, 0), (0, capacity - width)), constant_values=1),
    )
    assert caches is not None
    done = jnp.less(controls.limits, 1)
    state = State(caches, starts, jnp.int32(width), jnp.zeros(batch, jnp.int32), jnp.int32(0), done)
    state, token, log_prob = _choose(model, hidden, state, controls)
    return _placed(definition, state, Chosen(token[:, None], log_prob[:, None]))


@functools.partial(jit, static_argnames=("definition", "options"), donate_argnums=(1,))
def decode_chunk(
    trees: tuple[Tree, Tree, Tree],
    state: State,
    ended: jax.Array,
    steps: jax.Array,
    controls: Controls,
    *,
    definition: Definition,
    options: ForwardOptions,
) -> tuple[State, Chosen]:
    """Adds up to `steps` tokens to each row that is not finished; ends early when all are.

    Args:
      trees: base, trainable, constants.
      state: state to continue from, which is donated; S ≥ index + steps.
      ended: bool[B], rows that the caller ends.
      steps: int32 scalar, at most `CHUNK`.
      controls: settings of the call.
      definition: definition of the model.
      options: compute dtype and attention backend.

    Returns:
      (the new state, the new tokens with n = `CHUNK`).
    """
    model: CausalLM = definition.bind(*trees)
    batch, capacity = state.starts.shape[0], _capacity(state.caches)
    ones = jnp.ones((batch, 1), jnp.int32)
    # New tokens belong to segment 1 like the prompt. The causal mask excludes the part of the cache
    # that is not filled yet, whose index is larger than that of the query.
    segments = (jnp.arange(capacity) >= state.starts[:, None]).astype(jnp.int32)
    first = state.count
    state = state._replace(done=state.done | ended)
    chosen = Chosen(jnp.full((batch, CHUNK), NO_TOKEN, jnp.int32), jnp.zeros((batch, CHUNK)))

    def one_token(carry: tuple[State, Chosen]) -> tuple[State, Chosen]:
        state, chosen = carry
        hidden, caches, _ = model.decoder(
            jnp.maximum(state.token, 0)[:, None],
            ones,
            (state.index - state.starts)[:, None],
            options,
            caches=state.caches,
            kv_segment_ids=segments,
            cache_index=state.index,
        )
        assert caches is not None
        place = state.count - first
        state = state._replace(caches=caches, index=state.index + 1)
        state, *new = _choose(model, hidden, state, controls)
        written = (
            lax.dynamic_update_slice(all_, one[:, None], (0, place))
            for all_, one in zip(chosen, new, strict=True)
        )
        return state, Chosen(*written)

    def unfinished(carry: tuple[State, Chosen]) -> jax.Array:
        return (carry[0].count - first < steps) & ~jnp.all(carry[0].done)

    return _placed(definition, *lax.while_loop(unfinished, one_token, (state, chosen)))


@functools.partial(jit, static_argnames=("definition", "capacity"))
def grow(state: State, *, definition: Definition, capacity: int) -> State:
    """Returns a state with caches of a larger capacity.

    The state is not donated, because an array cannot be reused for one of another size.
    """

    def larger(array: jax.Array) -> jax.Array:
        added = [(0, 0)] * array.ndim
        added[2] = (0, capacity - array.shape[2])
        return jnp.pad(array, added)

    caches = jax.tree.map(larger, state.caches)
    return state._replace(caches=constrain_caches(caches, definition.blocks))


def _capacity(caches: list[Cache]) -> int:
    return jax.tree.leaves(caches)[0].shape[2]


def _choose(
    model: CausalLM, hidden: jax.Array, state: State, controls: Controls
) -> tuple[State, jax.Array, jax.Array]:
    """Chooses the token after the last of hidden [B, T, hidden].

    Returns:
      (the state with it, ids int32[B], log-probabilities float32[B]).
    """
    token, log_prob = choose(model.head()(hidden[:, -1]), controls.sampling, state.count)
    token = jnp.where(state.done, NO_TOKEN, token)
    log_prob = jnp.where(state.done, 0, log_prob)
    count = state.count + 1
    done = state.done | jnp.isin(token, controls.end) | (count >= controls.limits)
    return state._replace(token=token, count=count, done=done), token, log_prob


def _placed(definition: Definition, state: State, chosen: Chosen) -> tuple[State, Chosen]:
    """Fixes the sharding of results, so that every call of a function has inputs of the same one.

    All arrays except the caches are small and held whole by every device, so that every process can
    read them.
    """

    def whole(array: jax.Array) -> jax.Array:
        return constrain(array, *(None,) * array.ndim)

    caches = constrain_caches(state.caches, definition.blocks)
    state = jax.tree.map(whole, state._replace(caches=[]))._replace(caches=caches)
    return state, jax.tree.map(whole, chosen)
