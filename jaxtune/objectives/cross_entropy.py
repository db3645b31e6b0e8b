"""Token cross-entropy that never holds [tokens, vocabulary] logits.

The sequence is cut into chunks. When a gradient is wanted, each chunk's is computed in the forward
pass, while its logits are at hand: nothing is recomputed, and all that is kept is the gradient
with respect to the hidden states and, if it is trained, the head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.layers.head import Head
from jaxtune.layers.linear import plain_values
from jaxtune.parallel.rules import devices_along

IGNORE = -100  # the target of a position that is not trained on, as in PyTorch


class TokenLoss(NamedTuple):
    """Sums over target tokens, float32 scalars.

    Attributes:
      loss: −log p of the targets.
      weight: how many targets there are.
      correct: targets that are the likeliest token.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array


def cross_entropy(
    hidden: jax.Array, head: Head, targets: jax.Array, tokens_per_chunk: int = 1024
) -> TokenLoss:
    """Sums the cross-entropy of every target.

    Args:
      hidden: [B, T, D], after the last norm.
      head: gives the logits.
      targets: int[B, T]; the token to predict at each position, or `IGNORE`.
      tokens_per_chunk: how many tokens' logits exist at a time on each device.

    Returns:
      Sums over all targets; divide by `weight` once, over the whole batch.
    """
    batch, length = targets.shape
    # Each device's rows count: a chunk gathers a head that is spread over devices.
    rows = max(1, batch // devices_along("batch"))
    chunk = min(length, max(1, tokens_per_chunk // rows))
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)
    loss, correct = _summed(hidden, head, targets, chunk)
    return TokenLoss(loss, jnp.sum(targets != IGNORE).astype(jnp.float32), correct)


def _chunk(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis=1)


def _chunk_sums(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (loss, correct, log-normaliser [B, C]) of logits float32 [B, C, V]."""
    counted = targets != IGNORE
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    loss = jnp.sum(jnp.where(counted, norm - picked, 0.0))
    correct = jnp.sum(counted & (picked >= jnp.max(logits, axis=-1)))
    return loss, correct.astype(jnp.float32), norm


@jax.custom_vjp
def _summed_dispatch(hidden: jax.Array, head: Head, targets: jax.Array, starts: jax.Array) -> Any:
    size = targets.shape[1] // starts.shape[0]

    def body(sums: Any, start: jax.Array) -> tuple[Any, None]:
        loss, correct, _ = _chunk_sums(
            head(_chunk(hidden, start, size)), _chunk(targets, start, size)
        )
        return (sums[0] + loss, sums[1] + correct), None

    return lax.scan(body, (jnp.float32(0), jnp.float32(0)), starts)[0]


def _summed(hidden: jax.Array, head: Head, targets: jax.Array, chunk: int) -> Any:
    return _summed_dispatch(hidden, head, targets, jnp.arange(0, targets.shape[1], chunk))


def _forward(hidden: Any, head: Any, targets: Any, starts: Any) -> tuple[Any, Any]:
    # An edited head has a frozen weight, whose gradient would be as large as the weight.
    leaves, structure = jax.tree.flatten(head, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    trained = [leaf.perturbed for leaf in leaves]
    hidden, leaves, targets, starts = plain_values((hidden, leaves, targets, starts))

    def logits_of(changed: list[jax.Array], x: jax.Array) -> jax.Array:
        rest = iter(changed)
        values = [next(rest) if t else leaf for t, leaf in zip(trained, leaves, strict=True)]
        return jax.tree.unflatten(structure, values)(x)

    changed = [leaf for t, leaf in zip(trained, leaves, strict=True) if t]
    size = targets.shape[1] // starts.shape[0]

    def body(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
        (total_loss, total_correct), d_head = carry
        x, y = _chunk(hidden, start, size), _chunk(targets, start, size)
        logits, pullback = jax.vjp(logits_of, changed, x)
        loss, correct, norm = _chunk_sums(logits, y)
        d_logits = jnp.exp(logits - norm[..., None])
        d_logits = d_logits - (jnp.arange(logits.shape[-1]) == y[..., None])
        grads = pullback(jnp.where((y != IGNORE)[..., None], d_logits, 0.0))
        d_head = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), d_head, grads[0])
        return ((total_loss + loss, total_correct + correct), d_head), grads[1]

    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in changed]
    initial = ((jnp.float32(0), jnp.float32(0)), zeros)
    (sums, d_head), d_hidden = lax.scan(body, initial, starts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    rest = iter(zip(d_head, [jnp.zeros((), leaf.dtype) for leaf in changed], strict=True))
    d_head = [next(rest) if t else None for t in trained]
    return sums, (d_hidden, jax.tree.unflatten(structure, d_head))


def _backward(residuals: Any, cotangents: Any) -> Any:
    d_hidden, d_head = residuals
    g = cotangents[0]
    # Pairs of a gradient and a scalar of the dtype it shall have; None for what is frozen.
    d_head = jax.tree.map(
        lambda pair: None if pair is None else (pair[0] * g).astype(pair[1].dtype),
        d_head,
        is_leaf=lambda pair: pair is None or type(pair) is tuple,
    )
    return (d_hidden * g).astype(d_hidden.dtype), d_head, None, None


_summed_dispatch.defvjp(_forward, _backward, symbolic_zeros=True)
