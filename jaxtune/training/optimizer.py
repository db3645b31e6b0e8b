"""The optimizer of a run: learning-rate schedules, gradient clipping and update rules."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.config import OptimizerConfig
from jaxtune.errors import BAD_PATTERN, JaxtuneError, closest, lookup
from jaxtune.registry import OPTIMIZERS, SCHEDULES

logger = logging.getLogger(__name__)


def constant(peak: float, steps: int, decay: int) -> optax.Schedule:
    """Returns the schedule that stays at the peak. See `SCHEDULES` in `jaxtune.registry`."""
    del steps, decay
    return optax.constant_schedule(peak)


def linear(peak: float, steps: int, decay: int) -> optax.Schedule:
    """Returns the linear decay to 0 over the steps after the warm-up."""
    del decay
    return optax.linear_schedule(peak, 0.0, max(steps, 1))


def cosine(peak: float, steps: int, decay: int) -> optax.Schedule:
    """Returns half a cosine from the peak to 0 over the steps after the warm-up."""
    del decay
    return optax.cosine_decay_schedule(peak, max(steps, 1))


def warmup_stable_decay(peak: float, steps: int, decay: int) -> optax.Schedule:
    """Returns the schedule that is constant and then decays linearly in the last `decay` steps."""
    decay = min(decay, steps)
    falling = optax.linear_schedule(peak, 0.0, max(decay, 1))
    return optax.join_schedules([optax.constant_schedule(peak), falling], [steps - decay])


def _decayed(
    rule: optax.GradientTransformation,
    settings: OptimizerConfig,
    schedule: optax.Schedule,
    mask: Any,
) -> optax.GradientTransformation:
    """Chains a rule with decoupled weight decay and the learning rate.

    `mask` is a tree of bools with the structure of the trainables: True where decay applies.
    """
    return optax.chain(
        rule,
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def adamw(settings: OptimizerConfig) -> optax.GradientTransformation:
    """Returns AdamW's rule (Loshchilov and Hutter, 2019), without decay and learning rate."""
    return optax.scale_by_adam(
        b1=settings.b1, b2=settings.b2, eps=settings.eps, mu_dtype=settings.moment_dtype
    )


def adafactor(settings: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Adafactor's rule (Shazeer and Stern, 2018), for an absolute learning rate.

    It has no first moment, which saves memory.
    """
    del settings
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def lion(settings: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Lion's rule (Chen et al., 2023)."""
    return optax.scale_by_lion(b1=settings.b1, b2=settings.b2, mu_dtype=settings.moment_dtype)


def sgd(settings: OptimizerConfig) -> optax.GradientTransformation:
    """Returns stochastic gradient descent with momentum (Polyak, 1964)."""
    return optax.trace(settings.b1, accumulator_dtype=settings.moment_dtype)


def make_schedule(
    settings: OptimizerConfig, steps: int, *, provisional: bool = False
) -> optax.Schedule:
    """Makes the learning-rate schedule of a run.

    The rate rises linearly from 0 over ``optimizer.warmup_steps`` steps and then follows
    ``optimizer.schedule``; all but constant reach 0 at the end of the run.

    Args:
      settings: the ``optimizer`` section.
      steps: length of the run.
      provisional: whether `steps` is a placeholder for a length in epochs or tokens, which is not
        known yet; suppresses the warning about a long warm-up.

    Returns:
      A function from the index of a step, from 0 (int32 scalar), to its rate (float32 scalar).

    Raises:
      JaxtuneError: an unknown schedule.

    Source: the ``get_*_schedule*`` functions of transformers have the same values.
    """
    warmup, peak = count_steps(settings.warmup_steps, steps), settings.learning_rate
    decay = count_steps(settings.decay_steps, steps)
    after = lookup(SCHEDULES, settings.schedule, key="optimizer.schedule").load()
    if warmup > steps and not provisional:
        logger.warning(
            "optimizer.warmup_steps=%d exceeds the %d steps of the run: the learning rate does not "
            "reach optimizer.learning_rate",
            warmup,
            steps,
        )
    rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
    falling = after(peak, max(steps - warmup, 0), decay)
    return optax.join_schedules([rising, falling], boundaries=[warmup])


def count_steps(value: float, steps: int) -> int:
    """Returns a number of steps; a float is a share of `steps` and is rounded up."""
    return math.ceil(value * steps) if isinstance(value, float) else value


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients together by ``min(1, max_norm / (norm + 1e-6))``.

    Args:
      max_norm: bound on the Euclidean norm over all leaves.

    Returns:
      A transformation without state.

    Source: ``torch.nn.utils.clip_grad_norm_``; optax's clip lacks the small constant.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def scale_rates(multipliers: Any) -> optax.GradientTransformation:
    """Multiplies the updates of each leaf, and so its learning rate, by a constant.

    Args:
      multipliers: pytree of floats with the structure of the trainables.

    Returns:
      A transformation without state.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, m: u if m == 1 else u * m, updates, multipliers), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def rate_multipliers(settings: OptimizerConfig, trainable: Any) -> Any:
    """Returns the learning rate of each leaf as a multiple of ``optimizer.learning_rate``.

    A pattern of ``group_rates`` is a regular expression that matches whole components of a dotted
    path: ``v_proj`` matches ``….self_attn.v_proj.lora_A`` but not ``kv_proj``. The first matching
    entry applies. LoRA+ multiplies the rate of every ``lora_B`` by its ratio in addition.

    Args:
      settings: the ``optimizer`` section.
      trainable: pytree of arrays, named by its paths.

    Returns:
      A pytree of floats with the structure of `trainable`.

    Raises:
      JaxtuneError: an entry is malformed or matches no trainable.

    Source: Hayou et al., 2024 (LoRA+).
    """
    groups = [_group_rate(entry, settings.learning_rate) for entry in settings.group_rates]
    matched: set[str] = set()

    def multiplier(path: jax.tree_util.KeyPath, leaf: Any) -> float:
        del leaf
        name = _name(path)
        plus = settings.lora_plus_ratio if name.rsplit(".", 1)[-1] == "lora_B" else 1.0
        found = [(p, m) for p, m in groups if re.search(rf"(^|\.)({p})(\.|$)", name)]
        matched.update(pattern for pattern, _ in found)
        return plus * (found[0][1] if found else 1.0)

    multipliers = jax.tree_util.tree_map_with_path(multiplier, trainable)
    for pattern, _ in groups:
        if pattern not in matched:
            paths = jax.tree_util.tree_leaves_with_path(trainable)
            parts = sorted({part for path, _ in paths for part in _name(path).split(".")})
            raise JaxtuneError(
                f'optimizer.group_rates: "{pattern}" matches no trainable{closest(pattern, parts)}'
            )
    return multipliers


def _group_rate(entry: str, peak: float) -> tuple[str, float]:
    """Parses ``pattern=4e-4`` or ``pattern=0.1x`` into a pattern and a multiple of `peak`."""
    pattern, _, text = entry.rpartition("=")
    try:
        re.compile(pattern)
        number = float(text.removesuffix("x"))
        if not pattern or not 0 <= number < math.inf or pattern.count("(") > 100:
            raise ValueError
    except (ValueError, *BAD_PATTERN):
        raise JaxtuneError(
            f'optimizer.group_rates: "{entry}" is not a pattern and its rate, such as lora_B=4e-4 '
            "or embed_tokens=0.1x"
        ) from None
    if text.endswith("x"):
        return pattern, number
    if not peak:
        raise JaxtuneError(
            f'optimizer.group_rates: "{entry}" follows the schedule of optimizer.learning_rate, '
            "which is 0"
        )
    return pattern, number / peak


def _name(path: jax.tree_util.KeyPath) -> str:
    """Returns the dotted path of a leaf."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def decay_mask(trainable: Any) -> Any:
    """Returns the mask of weight decay, which applies to all trainables but norms and biases.

    They are recognized by name. The usual test, fewer than two dimensions, does not work here:
    weights are stacked over the layers of a block, so a norm is [layers, n].

    Args:
      trainable: pytree of arrays, named by its paths.

    Returns:
      A pytree of bools with the structure of `trainable`.
    """

    def decays(path: jax.tree_util.KeyPath, leaf: Any) -> bool:
        del leaf
        names = _name(path).lower().split(".")
        return names[-1] != "bias" and not any("norm" in name for name in names)

    return jax.tree_util.tree_map_with_path(decays, trainable)


def make_optimizer(
    settings: OptimizerConfig, trainable: Any, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Makes the optimizer of a run: clipping, then the rule at the scheduled rate.

    Args:
      settings: the ``optimizer`` section.
      trainable: pytree of float32 arrays or ShapeDtypeStructs; second moments have their dtype.
      schedule: learning-rate schedule; see `make_schedule`.

    Returns:
      The transformation from gradients to updates, both with the structure of `trainable`.

    Raises:
      JaxtuneError: an unknown optimizer, or a group rate that matches no trainable.
    """
    rule = lookup(OPTIMIZERS, settings.name, key="optimizer.name").load()(settings)
    parts = [_decayed(rule, settings, schedule, decay_mask(trainable))]
    if settings.clip_norm:
        parts.insert(0, clip_by_global_norm(settings.clip_norm))
    if settings.lora_plus_ratio != 1 or settings.group_rates:
        parts.append(scale_rates(rate_multipliers(settings, trainable)))
    return optax.chain(*parts)
