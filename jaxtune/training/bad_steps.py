"""What keeps a bad update away from the weights: not-a-number, float16's range, spikes.

The judgement is part of the jitted step, and all that it remembers is part of the training state:
a resumed run decides as an uninterrupted one would.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MADE, NOT_FINITE, OVERFLOW, SPIKE = range(4)
REASONS = {
    NOT_FINITE: "not finite",
    OVERFLOW: "float16 overflow",
    SPIKE: "spike",
}
"""Why an update was skipped, by the metric ``skipped`` of a step; `MADE` is 0."""

# Of torch.amp.GradScaler, but for the ceiling, which keeps the scale itself far from infinity.
_FIRST_SCALE, _LAST_SCALE, _GROWTH_INTERVAL = 2.0**16, 2.0**24, 2000
_WINDOW = 20  # updates that the running means look back on


class GuardSettings(NamedTuple):
    """What a step guards against, besides numbers that are not finite.

    Attributes:
      scaling: whether gradients are computed at a scale, as float16 needs.
      spike_factor: loss or gradient norm over its running mean that makes a spike; 0: none.
    """

    scaling: bool = False
    spike_factor: float = 0.0


NO_GUARD = GuardSettings()


class Guard(NamedTuple):
    """What the judgement remembers: scalars.

    Attributes:
      scale: float32, the loss scale; 1 where gradients are not scaled.
      steady: int32, updates since it last changed.
      loss: float32, running mean over the updates that were made.
      grad_norm: float32, the same of the gradient norm before clipping.
      seen: int32, updates in these means.
    """

    scale: Any
    steady: Any
    loss: Any
    grad_norm: Any
    seen: Any


def first_guard(settings: GuardSettings) -> Guard:
    """Returns what is remembered before the first update."""
    scale = _FIRST_SCALE if settings.scaling else 1.0
    # Arrays of their own, for a step donates each of them.
    return Guard(
        scale=jnp.float32(scale),
        steady=jnp.int32(0),
        loss=jnp.float32(0),
        grad_norm=jnp.float32(0),
        seen=jnp.int32(0),
    )


def judge(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, settings: GuardSettings
) -> tuple[jax.Array, Guard]:
    """Judges an update.

    A loss scale halves when gradients overflow under it and doubles after 2000 updates that do
    not. An overflow at a scale of 1, or a loss that is not finite, is not caused by the scale.

    Args:
      guard: what is remembered.
      loss: float32 scalar, without the scale.
      grad_norm: float32 scalar, without the scale, before clipping.
      settings: static.

    Returns:
      `MADE` or a key of `REASONS`, int32, and what to remember from now on.

    Source: torch.amp.GradScaler for the scale.
    """
    sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    verdict = jnp.where(sound, MADE, NOT_FINITE)
    if settings.scaling:
        range_left = jnp.isfinite(loss) & (guard.scale > 1)
        verdict = jnp.where(~sound & range_left, OVERFLOW, verdict)
    if settings.spike_factor:
        factor = settings.spike_factor
        high = (loss > factor * guard.loss) | (grad_norm > factor * guard.grad_norm)
        verdict = jnp.where(sound & high & (guard.seen >= _WINDOW), SPIKE, verdict)
    made = verdict == MADE
    weight = 1 / jnp.minimum(guard.seen + 1, _WINDOW).astype(jnp.float32)

    def mean(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(made, old + weight * (new - old), old)

    scale, steady = guard.scale, guard.steady
    if settings.scaling:
        steady = jnp.where(made, steady + 1, steady)
        grows = steady >= _GROWTH_INTERVAL
        scale = jnp.where(grows, jnp.minimum(2 * scale, _LAST_SCALE), scale)
        over = verdict == OVERFLOW
        scale = jnp.where(over, jnp.maximum(scale / 2, 1.0), scale)
        steady = jnp.where(grows | over, 0, steady)
    seen = jnp.where(made, guard.seen + 1, guard.seen)
    remembered = Guard(
        scale, steady, mean(guard.loss, loss), mean(guard.grad_norm, grad_norm), seen
    )
    return verdict.astype(jnp.int32), remembered
