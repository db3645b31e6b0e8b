"""Random draws for dropout and noise, with one key or with a key for each row of a batch.

With a key for each row, what a row draws does not depend on the rows beside it, and so not on the
split of a batch into micro-batches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def fold_in(key: jax.Array, data: jax.Array | int) -> jax.Array:
    """Folds an integer into a key, or into each of the keys [B]."""
    if key.ndim == 0:
        return jax.random.fold_in(key, data)
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(key, data)


def single_key(key: jax.Array) -> jax.Array:
    """Returns one key, a scalar, for a draw that the rows of a batch share."""
    return key if key.ndim == 0 else key[0]


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws float32 values between -1 and 1; with keys [B], those of each row from its own."""
    if key.ndim == 0:
        return jax.random.uniform(key, shape, minval=-1, maxval=1)
    return jax.vmap(lambda one: uniform(one, shape[1:]))(key)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share of the values of x to zero and scales the others up.

    Args:
      x: [..., n], or [B, ...] with a key for each row.
      rate: share of the values.
      key: a scalar key, or keys [B]; None returns x unchanged.
    """
    if key is None or rate == 0:
        return x
    if key.ndim:
        return jax.vmap(lambda x, one: dropout(x, rate, one))(x, key)
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
