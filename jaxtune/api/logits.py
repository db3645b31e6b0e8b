"""Logits of whole sequences: the compiled pass, and positions for segments and virtual tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxtune.errors import JaxtuneError
from jaxtune.layers.cpu_bfloat16 import jit
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.vocabulary import check_token_ids


@functools.partial(jit, static_argnames=("definition", "options"))
def logits(
    trees: tuple[Tree, Tree, Tree],
    tokens: jax.Array,
    segment_ids: jax.Array,
    positions: jax.Array,
    definition: Definition,
    options: ForwardOptions,
) -> jax.Array:
    """Returns float32[B, T, vocabulary] of tokens, segment ids and positions, int[B, T] each."""
    model = definition.bind(*trees)
    hidden, _, _ = model.decoder(tokens, segment_ids, positions, options)
    return model.head()(hidden)


def pass_inputs(
    definition: Definition,
    tokens: ArrayLike,
    segment_ids: ArrayLike | None,
    positions: ArrayLike | None,
) -> tuple[Any, Any, Any, np.ndarray | None]:
    """Checks and completes the arguments of `jaxtune.Model.logits`.

    Returns:
      (tokens, segment ids and positions of the pass, int[B, S] each; the index in S of each of the
      given tokens, int[B, T], or None if S is T). S is larger than T with virtual tokens, whose
      logits are computed and dropped.

    Raises:
      JaxtuneError: an array has another shape, or a token id is outside the vocabulary.
    """
    check_token_ids(tokens, definition.vocab_size, "tokens")
    tokens = jnp.asarray(tokens, jnp.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise JaxtuneError(f"tokens must be int[batch, time], not of shape {list(tokens.shape)}")
    for name, value in (("segment_ids", segment_ids), ("positions", positions)):
        if value is not None and np.shape(value) != tokens.shape:
            shape, needed = list(np.shape(value)), list(tokens.shape)
            raise JaxtuneError(f"{name} have shape {shape}, but tokens have {needed}")
        if value is not None:
            _check_int32(name, value)
    segments = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
    place = segment_positions(segments) if positions is None else jnp.asarray(positions)
    if not definition.reserved:
        return tokens, segments, place, None
    return make_room(tokens, segments, place, definition.reserved)


def _check_int32(name: str, value: ArrayLike) -> None:
    """Raises if an array holds anything but integers from 0 to the largest of int32."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() >= 2**31:
        raise JaxtuneError(f"{name} must be integers ≥ 0 and < 2³¹")


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Returns positions from 0 within each stretch of equal ids: int[B, T] → int32[B, T].

    The position is the index minus the start of the stretch, which is the running maximum of the
    indices at which the id changes.
    """
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def make_room(
    tokens: jax.Array, segment_ids: jax.Array, positions: jax.Array, reserved: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inserts `reserved` positions for virtual tokens in front of every segment.

    Args:
      tokens: int[B, T].
      segment_ids: int[B, T].
      positions: int[B, T].
      reserved: number of virtual tokens.

    Returns:
      tokens, segment_ids and positions, int[B, T + reserved · segments] with the largest number of
      segments of a row, and the new index of each original token, int[B, T].
    """
    segments = np.asarray(segment_ids)
    # A token moves right by `reserved` for each segment that has begun up to it.
    first = np.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    before = np.cumsum(first & (segments != 0), axis=1)
    text = np.arange(segments.shape[1]) + reserved * before
    wider = (segments.shape[0], segments.shape[1] + reserved * int(before.max()))
    moved = [np.zeros(wider, np.int32) for _ in range(3)]
    for row, start in zip(*np.nonzero(first & (segments != 0)), strict=True):
        head = slice(text[row, start] - reserved, text[row, start])
        moved[1][row, head] = segments[row, start]
        moved[2][row, head] = np.arange(reserved)
    shifted = np.where(segments != 0, np.asarray(positions) + reserved, 0)
    for wide, value in zip(moved, (np.asarray(tokens), segments, shifted), strict=True):
        np.put_along_axis(wide, text, value, axis=1)
    return moved[0], moved[1], moved[2], text
