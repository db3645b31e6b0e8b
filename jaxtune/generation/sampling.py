"""Choice of the next token: settings, filters and random numbers."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.errors import JaxtuneError, check_argument, shown

_SEEDS = 2**31  # bound of int32, the dtype of seeds in JAX
_LARGEST = 3.4e38  # of float32


class Sampling(NamedTuple):
    """Settings for choosing the next token.

    Attributes:
      temperature: sampling temperature; 0 decodes greedily.
      top_p: minimum total probability of the smallest set of tokens to sample from.
      seed: random seed.
      top_k: number of most likely tokens to sample from; 0 for all. It is applied before `top_p`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0


def check_sampling(sampling: Sampling) -> None:
    """Raises a JaxtuneError that names the setting if one is out of range."""
    check_argument("sampling", sampling, Sampling, "an instance of jaxtune.Sampling")
    temperature, top_p, seed, top_k = sampling
    # All comparisons with NaN are false, so NaN is rejected as well.
    if not isinstance(temperature, numbers.Real) or not 0 <= temperature <= _LARGEST:
        raise JaxtuneError(f"temperature={shown(temperature)} is not a finite number ≥ 0")
    if not isinstance(top_p, numbers.Real) or not 0 < top_p <= 1:
        raise JaxtuneError(f"top_p={shown(top_p)} is not within 0 (excluded) and 1")
    if not isinstance(top_k, numbers.Integral) or not 0 <= top_k < _SEEDS:
        raise JaxtuneError(
            f"top_k={shown(top_k)} is not a number of tokens: ≥ 1, or 0 for all tokens"
        )
    if not isinstance(seed, numbers.Integral) or not -_SEEDS <= seed < _SEEDS:
        raise JaxtuneError(f"seed={shown(seed)} is not within {-_SEEDS} and {_SEEDS - 1}")


def choose(
    logits: jax.Array, sampling: Sampling, index: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """Chooses the next token of each row.

    The random numbers of a row depend on the seed, the number of the row and the index of the
    token, and not on other rows. All settings are traced: other values share the compilation.

    Args:
      logits: float32[B, V].
      sampling: settings, as scalars.
      index: number of tokens generated so far, an int32 scalar.

    Returns:
      (token ids int32[B]; their log-probabilities under the model, float32[B], in nats, which
      temperature and filters do not change).
    """

    def draw() -> jax.Array:
        scaled = logits / sampling.temperature
        filtered = (sampling.top_p < 1) | (sampling.top_k > 0)
        scaled = lax.cond(filtered, lambda: _filter(scaled, sampling), lambda: scaled)
        key = jax.random.fold_in(jax.random.key(sampling.seed), index)
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(logits.shape[0]))
        return jax.vmap(jax.random.categorical)(keys, scaled)

    greedy = jnp.asarray(sampling.temperature) == 0
    tokens = lax.cond(greedy, lambda: jnp.argmax(logits, axis=-1), draw).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _filter(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns float32[B, V] with −∞ for tokens outside top_k and top_p.

    The logits are sorted in descending order and cut after top_k. Of the rest, the tokens whose
    predecessors have a total probability below top_p form the smallest sufficient set, and the
    logit of its last member is the threshold below which all others are masked.
    """
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    count = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])
    ordered = jnp.where(jnp.arange(logits.shape[-1]) < count, ordered, -jnp.inf)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The token that crosses top_p is included, and so is the most likely one: nothing precedes it.
    kept = (before < sampling.top_p) & (ordered > -jnp.inf)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)
    return jnp.where(logits >= smallest[:, None], logits, -jnp.inf)
