"""Skipping bad steps: values that are not finite, float16 overflows and spikes.

The check runs inside the jitted step, and its running means and loss scale are part of the training
state, so a resumed run skips the same steps as an uninterrupted one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

APPLIED, NOT_FINITE, OVERFLOW, SPIKE = range(4)
REASONS = {
    NOT_FINITE: "not finite",
    OVERFLOW: "float16 overflow",
    SPIKE: "spike",
}
"""Reason for a skipped step by its code, the value of the metric ``skipped``; 0 is `APPLIED`."""

# Defaults of torch.amp.GradScaler, and an upper bound that keeps the scale finite.
_INITIAL_SCALE, _LARGEST_SCALE, _GROWTH_INTERVAL = 2.0**16, 2.0**24, 2000
_WINDOW = 20  # applied steps that the running means average over


class GuardSettings(NamedTuple):
    """Conditions under which a step is skipped, in addition to values that are not finite.

    Attributes:
      scaling: whether gradients are computed with a loss scale, as float16 needs.
      spike_factor: multiple of its running mean above which a loss or gradient norm counts as a
        spike; 0 disables the check.
    """

    scaling: bool = False
    spike_factor: float = 0.0


NO_GUARD = GuardSettings()


class Guard(NamedTuple):
    """The state of the check; all fields are scalars.

    Attributes:
      scale: float32, loss scale; 1 where gradients are not scaled.
      steady: int32, applied steps since the scale last changed.
      loss: float32, running mean of the loss over applied steps.
      grad_norm: float32, running mean of the gradient norm before clipping.
      seen: int32, applied steps in these means.
    """

    scale: Any
    steady: Any
    loss: Any
    grad_norm: Any
    seen: Any


def initial_guard(settings: GuardSettings) -> Guard:
    """Returns the state of the check before the first step."""
    scale = _INITIAL_SCALE if settings.scaling else 1.0
    # Separate arrays, since a step donates each of them.
    return Guard(
        scale=jnp.float32(scale),
        steady=jnp.int32(0),
        loss=jnp.float32(0),
        grad_norm=jnp.float32(0),
        seen=jnp.int32(0),
    )


def check_step(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, settings: GuardSettings
) -> tuple[jax.Array, Guard]:
    """Decides whether a step is applied.

    The loss scale is halved when gradients overflow and doubled after 2000 applied steps without an
    overflow. A smaller scale cannot help at scale 1 or if the loss itself is not finite; such a
    step is `NOT_FINITE` rather than `OVERFLOW`.

    Args:
      guard: state of the check.
      loss: float32 scalar, without the loss scale.
      grad_norm: float32 scalar, without the loss scale, before clipping.
      settings: static settings.

    Returns:
      The outcome, int32 scalar (`APPLIED` or a key of `REASONS`), and the new state of the check.

    Source: torch.amp.GradScaler for the scale.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    outcome = jnp.where(finite, APPLIED, NOT_FINITE)
    if settings.scaling:
        reducible = jnp.isfinite(loss) & (guard.scale > 1)
        outcome = jnp.where(~finite & reducible, OVERFLOW, outcome)
    if settings.spike_factor:
        factor = settings.spike_factor
        high = (loss > factor * guard.loss) | (grad_norm > factor * guard.grad_norm)
        outcome = jnp.where(finite & high & (guard.seen >= _WINDOW), SPIKE, outcome)
    applied = outcome == APPLIED
    # The mean of all applied steps up to `_WINDOW` of them, then an exponential moving average. The
    # `where` below excludes skipped steps; with weight 0, a NaN would still enter the mean.
    weight = 1 / jnp.minimum(guard.seen + 1, _WINDOW).astype(jnp.float32)

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(applied, old + weight * (new - old), old)

    scale, steady = guard.scale, guard.steady
    if settings.scaling:
        steady = jnp.where(applied, steady + 1, steady)
        grows = steady >= _GROWTH_INTERVAL
        scale = jnp.where(grows, jnp.minimum(2 * scale, _LARGEST_SCALE), scale)
        overflow = outcome == OVERFLOW
        scale = jnp.where(overflow, jnp.maximum(scale / 2, 1.0), scale)
        steady = jnp.where(grows | overflow, 0, steady)
    seen = jnp.where(applied, guard.seen + 1, guard.seen)
    new = Guard(scale, steady, mean(guard.loss, loss), mean(guard.grad_norm, grad_norm), seen)
    return outcome.astype(jnp.int32), new
