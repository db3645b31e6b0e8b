"""Token cross-entropy that never holds [tokens, vocabulary] logits.

The sequence is cut into chunks of C positions, whose logits [B, C, V] exist one chunk at a time.
The loss is a sum over tokens, so the gradient with respect to a chunk's logits is known as soon as
they are: softmax − one-hot, up to the factor that arrives in the backward pass. Under
differentiation the forward pass therefore computes the gradients of each chunk while its logits are
in memory, and the backward pass only multiplies them by that factor. Nothing is recomputed, and the
only residuals are the gradients with respect to the hidden states [B, T, D] and, if it is trained,
the head.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.layers.head import Head
from jaxtune.layers.linear import plain_values
from jaxtune.parallel.rules import devices_along

IGNORE = -100  # target of a position without a loss, as in PyTorch


class LossTerms(NamedTuple):
    """Terms of the loss in addition to the cross-entropy; 0 leaves a term out.

    Attributes:
      label_smoothing: ε of targets mixed from 1 - ε of the token and ε of the uniform distribution.
      z_loss: factor on the square of the log-normaliser, which keeps logits near 0.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


NO_TERMS = LossTerms()


class TokenLoss(NamedTuple):
    """Sums over target tokens, float32 scalars.

    Attributes:
      loss: the minimised sum, the only one with a gradient.
      weight: number of targets.
      correct: number of targets that are the most likely token.
      nll: sum of −log p of the targets.
      uniform: sum of cross-entropies of the uniform distribution; 0 without label smoothing.
      squared_norm: sum of squares of the log-normaliser.
    """

    loss: jax.Array
    weight: jax.Array
    correct: jax.Array
    nll: jax.Array
    uniform: jax.Array
    squared_norm: jax.Array


def cross_entropy(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    tokens_per_chunk: int = 1024,
    terms: LossTerms = NO_TERMS,
    scale: jax.Array | None = None,
) -> TokenLoss:
    """Sums the cross-entropy of every target.

    Args:
      hidden: [B, T, D], after the last norm.
      head: computes the logits.
      targets: int[B, T]; the token to predict at each position, or `IGNORE`.
      tokens_per_chunk: number of tokens whose logits each device holds at a time.
      terms: additional terms of the loss.
      scale: the factor by which the caller multiplies the loss, float32 scalar. The gradient is
        computed at this scale, so that float16 can represent it; the result differs by rounding
        alone.

    Returns:
      Sums over all targets; divide by `weight` once, over the whole batch.

    Source: Szegedy et al., 2016 (label smoothing); Chowdhery et al., 2022 (z-loss).
    """
    batch, length = targets.shape
    # tokens_per_chunk counts tokens of one device. Chunks of the whole batch would be smaller on
    # each device, and every chunk gathers a trained head again.
    rows = max(1, batch // devices_along("batch"))
    chunk = min(length, max(1, tokens_per_chunk // rows))
    pad = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)), constant_values=IGNORE)
    starts = jnp.arange(0, targets.shape[1], chunk)
    scale = jnp.float32(1) if scale is None else scale
    sums: Any = _summed(hidden, head, targets, starts, scale, terms)
    loss, correct, nll, uniform, squared = sums
    weight = jnp.sum(targets != IGNORE).astype(jnp.float32)
    return TokenLoss(loss, weight, correct, nll, uniform, squared)


def _chunk(array: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(array, start, size, axis=1)


def _chunk_sums(
    logits: jax.Array, targets: jax.Array, terms: LossTerms
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Sums a chunk of logits float32 [B, C, V].

    Returns:
      (loss, correct, nll, uniform, squared norm) and the log-normaliser [B, C].
    """
    counted = targets != IGNORE
    norm = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]

    def total(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counted, values, 0.0))

    nll, squared, uniform = total(norm - picked), total(jnp.square(norm)), jnp.float32(0)
    loss = nll
    if terms.label_smoothing:
        uniform = total(norm - jnp.mean(logits, axis=-1))
        loss = loss + terms.label_smoothing * (uniform - nll)
    if terms.z_loss:
        loss = loss + terms.z_loss * squared
    correct = jnp.sum(counted & (picked >= jnp.max(logits, axis=-1))).astype(jnp.float32)
    return (loss, correct, nll, uniform, squared), norm


def _logit_gradient(
    logits: jax.Array, norm: jax.Array, targets: jax.Array, terms: LossTerms
) -> jax.Array:
    """Returns the gradient of a chunk's loss with respect to its logits, [B, C, V]."""
    gradient = jnp.exp(logits - norm[..., None])
    if terms.z_loss:
        gradient = gradient * (1 + 2 * terms.z_loss * norm[..., None])
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    if terms.label_smoothing:
        smoothed = terms.label_smoothing / logits.shape[-1]
        gradient = gradient - hit * (1 - terms.label_smoothing) - smoothed
    else:
        gradient = gradient - hit
    return jnp.where((targets != IGNORE)[..., None], gradient, 0.0)


def _zero_sums() -> tuple[jax.Array, ...]:
    return tuple(jnp.float32(0) for _ in range(5))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _summed(
    hidden: jax.Array,
    head: Head,
    targets: jax.Array,
    starts: jax.Array,
    scale: jax.Array,
    terms: LossTerms,
) -> Any:
    del scale
    head = head.gathered()
    size = targets.shape[1] // starts.shape[0]

    def body(sums: Any, start: jax.Array) -> tuple[Any, None]:
        logits = head(_chunk(hidden, start, size))
        more, _ = _chunk_sums(logits, _chunk(targets, start, size), terms)
        return jax.tree.map(jnp.add, sums, more), None

    return lax.scan(body, _zero_sums(), starts)[0]


def _forward(
    hidden: Any, head: Any, targets: Any, starts: Any, scale: Any, terms: LossTerms
) -> tuple[Any, Any]:
    """Returns the sums, and as residuals the gradients of the loss times `scale`.

    With symbolic zeros each argument's leaves are pairs of a value and `perturbed`. Gradients are
    computed only for the head's perturbed leaves: an edited head has a frozen weight, whose
    gradient would be as large as the weight.
    """
    leaves, structure = jax.tree.flatten(head, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    trained = [leaf.perturbed for leaf in leaves]
    hidden, leaves, targets, starts, scale = plain_values((hidden, leaves, targets, starts, scale))
    head = jax.tree.unflatten(structure, leaves)
    if not any(trained[: len(jax.tree.leaves(head.weight))]):
        # A trained weight stays sharded, like the sum of its gradient.
        leaves = jax.tree.leaves(head.gathered())

    # The logits as a function of the trained leaves and the hidden states alone.
    def logits_of(changed: list[jax.Array], x: jax.Array) -> jax.Array:
        rest = iter(changed)
        values = [next(rest) if t else leaf for t, leaf in zip(trained, leaves, strict=True)]
        return jax.tree.unflatten(structure, values)(x)

    changed = [leaf for t, leaf in zip(trained, leaves, strict=True) if t]
    size = targets.shape[1] // starts.shape[0]

    def body(carry: Any, start: jax.Array) -> tuple[Any, jax.Array]:
        sums, d_head = carry
        x, y = _chunk(hidden, start, size), _chunk(targets, start, size)
        logits, pullback = jax.vjp(logits_of, changed, x)
        more, norm = _chunk_sums(logits, y, terms)
        grads = pullback(scale * _logit_gradient(logits, norm, y, terms))
        d_head = jax.tree.map(lambda a, g: a + g.astype(jnp.float32), d_head, grads[0])
        return (jax.tree.map(jnp.add, sums, more), d_head), grads[1]

    # The scan adds up the head's gradient over chunks and stacks those of the hidden states.
    zeros = [jnp.zeros(leaf.shape, jnp.float32) for leaf in changed]
    (sums, d_head), d_hidden = lax.scan(body, (_zero_sums(), zeros), starts)
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden.shape)
    # Residuals are arrays, so a scalar carries the dtype that a gradient is to be rounded to.
    rest = iter(zip(d_head, [jnp.zeros((), leaf.dtype) for leaf in changed], strict=True))
    d_head = [next(rest) if t else None for t in trained]
    return sums, (d_hidden, jax.tree.unflatten(structure, d_head), scale)


def _backward(terms: LossTerms, residuals: Any, cotangents: Any) -> Any:
    """Multiplies the residual gradients with the cotangent of the loss.

    The caller multiplies the loss by `scale`, so the cotangent contains it; the residuals do
    already, hence the division, which is exact because loss scales are powers of two.
    """
    del terms
    d_hidden, d_head, scale = residuals
    g = cotangents[0] / scale
    # Leaves are pairs of a gradient and a scalar of its final dtype, or None for frozen ones.
    d_head = jax.tree.map(
        lambda pair: None if pair is None else (pair[0] * g).astype(pair[1].dtype),
        d_head,
        is_leaf=lambda pair: pair is None or type(pair) is tuple,
    )
    return (d_hidden * g).astype(d_hidden.dtype), d_head, None, None, None


_summed.defvjp(_forward, _backward, symbolic_zeros=True)
