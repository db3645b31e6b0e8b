"""The optimizer of a run: learning-rate schedule, gradient clipping, update rule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.errors import lookup

logger = logging.getLogger(__name__)


def _constant(peak: float, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def _linear(peak: float, steps: int) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, max(steps, 1))


def _cosine(peak: float, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, max(steps, 1))


SCHEDULES: dict[str, Callable[[float, int], optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}
"""What follows the warm-up, by name: ``(peak, updates left) -> schedule``."""


def _adamw(settings: Any, schedule: optax.Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=mask,
    )


OPTIMIZERS: dict[str, Callable[[Any, optax.Schedule, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
}
"""Update rules by name: ``(optimizer section, schedule, decay mask) -> transformation``."""


def make_schedule(config: Any) -> optax.Schedule:
    """Makes the learning-rate schedule of a run.

    The rate rises linearly from 0 over ``optimizer.warmup_steps`` updates and then follows
    ``optimizer.schedule``; linear and cosine reach 0 at ``training.steps``.

    Args:
      config: the resolved config.

    Returns:
      A function of the update's number, from 0 (int32 scalar), to its rate (float32 scalar).

    Raises:
      JaxtuneError: an unknown schedule.

    Source: the ``get_*_schedule_with_warmup`` functions of transformers have the same values.
    """
    settings, steps = config.optimizer, config.training.steps
    after = lookup(SCHEDULES, settings.schedule, key="optimizer.schedule")
    warmup, peak = settings.warmup_steps, settings.learning_rate
    if warmup > steps:
        logger.warning(
            "optimizer.warmup_steps=%d is more than training.steps=%d: the run ends before the "
            "learning rate is what optimizer.learning_rate says",
            warmup,
            steps,
        )
    rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules([rising, after(peak, max(steps - warmup, 0))], boundaries=[warmup])


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients together by ``min(1, max_norm / (norm + 1e-6))``.

    Args:
      max_norm: bound on the Euclidean norm over all leaves.

    Returns:
      A transformation without state.

    Source: ``torch.nn.utils.clip_grad_norm_``, whose small constant optax's own clip lacks.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def scale_lora_B(ratio: float) -> optax.GradientTransformation:
    """Scales the updates of every LoRA factor B, which is what scaling their rate does.

    Args:
      ratio: learning rate of B over that of all else.

    Returns:
      A transformation without state.

    Source: Hayou et al., 2024 (LoRA+).
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def scaled(path: jax.tree_util.KeyPath, value: jax.Array) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator=".").rsplit(".", 1)[-1]
            return value * ratio if name == "lora_B" else value

        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def decay_mask(trainable: Any) -> Any:
    """Says which trainables weight decay applies to: all but norms and biases.

    Names decide, for arrays stacked over layers have a rank of one more than in the model.

    Args:
      trainable: pytree of arrays, named by its paths.

    Returns:
      The same tree with a bool for each leaf.
    """

    def decays(path: jax.tree_util.KeyPath, leaf: Any) -> bool:
        del leaf
        names = jax.tree_util.keystr(path, simple=True, separator=".").lower().split(".")
        return names[-1] != "bias" and not any("norm" in name for name in names)

    return jax.tree_util.tree_map_with_path(decays, trainable)


def make_optimizer(config: Any, trainable: Any) -> optax.GradientTransformation:
    """Makes the optimizer of a run: clipping, then the update rule at the scheduled rate.

    Args:
      config: the resolved config.
      trainable: pytree of float32 arrays or shapes; moments take their dtype.

    Returns:
      The transformation from gradients to the updates to add, both shaped as `trainable`.

    Raises:
      JaxtuneError: an unknown optimizer or schedule.
    """
    settings = config.optimizer
    rule = lookup(OPTIMIZERS, settings.name, key="optimizer.name")
    update = rule(settings, make_schedule(config), decay_mask(trainable))
    if settings.lora_plus_ratio != 1:
        update = optax.chain(update, scale_lora_B(settings.lora_plus_ratio))
    if settings.clip_norm == 0:
        return update
    return optax.chain(clip_by_global_norm(settings.clip_norm), update)
