"""The optimizer of a run: learning-rate schedule, gradient clipping, update rule."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from jaxtune.errors import JaxtuneError, closest, lookup

logger = logging.getLogger(__name__)


def _constant(peak: float, steps: int, settings: Any) -> optax.Schedule:
    return optax.constant_schedule(peak)


def _linear(peak: float, steps: int, settings: Any) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, max(steps, 1))


def _cosine(peak: float, steps: int, settings: Any) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, max(steps, 1))


def _wsd(peak: float, steps: int, settings: Any) -> optax.Schedule:
    decay = min(settings.decay_steps, steps)
    falling = optax.linear_schedule(peak, 0.0, max(decay, 1))
    return optax.join_schedules([optax.constant_schedule(peak), falling], [steps - decay])


SCHEDULES: dict[str, Callable[[float, int, Any], optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "wsd": _wsd,
}
"""What follows the warm-up, by name: ``(peak, updates left, optimizer section) -> schedule``.

Shares of the run are whole numbers of updates in the section by then.
"""


def _decayed(
    rule: optax.GradientTransformation, settings: Any, schedule: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """Chains a rule with decoupled decay and the learning rate."""
    return optax.chain(
        rule,
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def _adamw(settings: Any) -> optax.GradientTransformation:
    return optax.scale_by_adam(
        b1=settings.b1, b2=settings.b2, eps=settings.eps, mu_dtype=settings.moment_dtype
    )


def _adafactor(settings: Any) -> optax.GradientTransformation:
    """The rule at an absolute rate, without the first moment: its point is to need no memory."""
    if settings.moment_dtype != "float32":
        raise JaxtuneError(
            f"optimizer.moment_dtype={settings.moment_dtype}: adafactor keeps no first moment"
        )
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


def _lion(settings: Any) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=settings.b1, b2=settings.b2, mu_dtype=settings.moment_dtype)


def _sgd(settings: Any) -> optax.GradientTransformation:
    return optax.trace(settings.b1, accumulator_dtype=settings.moment_dtype)


OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "sgd": _sgd,
}
"""Update rules by name: ``optimizer section -> transformation``, before decay and rate.

Source: Loshchilov and Hutter, 2019; Shazeer and Stern, 2018; Chen et al., 2023; Polyak, 1964.
"""


def make_schedule(config: Any, steps: int | None = None) -> optax.Schedule:
    """Makes the learning-rate schedule of a run.

    The rate rises linearly from 0 over ``optimizer.warmup_steps`` updates and then follows
    ``optimizer.schedule``; all but constant reach 0 at the end of the run.

    Args:
      config: the resolved config.
      steps: updates of the run; ``training.steps`` by default, which stands in for a length in
        epochs or tokens until that is known.

    Returns:
      A function of the update's number, from 0 (int32 scalar), to its rate (float32 scalar).

    Raises:
      JaxtuneError: an unknown schedule.

    Source: the ``get_*_schedule*`` functions of transformers have the same values.
    """
    unknown = steps is None and bool(config.training.epochs or config.training.tokens)
    steps = int(config.training.steps if steps is None else steps)
    settings: Any = ml_collections.ConfigDict(config.optimizer)
    for name in ("warmup_steps", "decay_steps"):
        settings[name] = count_updates(settings[name], steps)
    after = lookup(SCHEDULES, settings.schedule, key="optimizer.schedule")
    warmup, peak = settings.warmup_steps, settings.learning_rate
    if warmup > steps and not unknown:
        logger.warning(
            "optimizer.warmup_steps=%d is more than the %d updates of the run: it ends before the "
            "learning rate is what optimizer.learning_rate says",
            warmup,
            steps,
        )
    rising = optax.linear_schedule(0.0, peak, max(warmup, 1))
    falling = after(peak, max(steps - warmup, 0), settings)
    return optax.join_schedules([rising, falling], boundaries=[warmup])


def count_updates(value: float, steps: int) -> int:
    """Returns a number of updates, of which a value below 1 is a share, rounded up."""
    return math.ceil(value * steps) if isinstance(value, float) else value


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


def scale_rates(multipliers: Any) -> optax.GradientTransformation:
    """Scales the updates of each leaf, which is what scaling its learning rate does.

    Args:
      multipliers: floats, of the structure of the trainables.

    Returns:
      A transformation without state.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda u, m: u if m == 1 else u * m, updates, multipliers), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def rate_multipliers(settings: Any, trainable: Any) -> Any:
    """Returns the learning rate of each leaf over that of the run.

    Args:
      settings: the ``optimizer`` section: ``group_rates``, and LoRA+'s ratio, which multiplies
        the rate of every LoRA factor B.
      trainable: pytree of arrays, named by its paths.

    Raises:
      JaxtuneError: an entry of another form, or one that matches no trainable.

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
                f'optimizer.group_rates: "{pattern}" matches nothing that is trained'
                f"{closest(pattern, parts)}"
            )
    return multipliers


def _group_rate(entry: str, peak: float) -> tuple[str, float]:
    """Reads ``pattern=4e-4`` or ``pattern=0.1x``; returns pattern and multiple of `peak`."""
    pattern, _, text = entry.rpartition("=")
    try:
        re.compile(pattern)
        number = float(text.removesuffix("x"))
        if not pattern or not 0 <= number < math.inf:
            raise ValueError
    except (ValueError, re.error):
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
    return jax.tree_util.keystr(path, simple=True, separator=".")


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
        names = _name(path).lower().split(".")
        return names[-1] != "bias" and not any("norm" in name for name in names)

    return jax.tree_util.tree_map_with_path(decays, trainable)


def make_optimizer(
    config: Any, trainable: Any, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Makes the optimizer of a run: clipping, then the update rule at the scheduled rate.

    Args:
      config: the resolved config.
      trainable: pytree of float32 arrays or shapes; second moments take their dtype.
      schedule: that of `make_schedule` by default.

    Returns:
      The transformation from gradients to the updates to add, both shaped as `trainable`.

    Raises:
      JaxtuneError: an unknown optimizer or schedule, or rates of nothing that is trained.
    """
    settings = config.optimizer
    rule = lookup(OPTIMIZERS, settings.name, key="optimizer.name")(settings)
    schedule = make_schedule(config) if schedule is None else schedule
    parts = [_decayed(rule, settings, schedule, decay_mask(trainable))]
    if settings.clip_norm:
        parts.insert(0, clip_by_global_norm(settings.clip_norm))
    if settings.lora_plus_ratio != 1 or settings.group_rates:
        parts.append(scale_rates(rate_multipliers(settings, trainable)))
    return optax.chain(*parts)
