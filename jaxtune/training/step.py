"""The jitted functions of a run: an optimizer step over micro-batches, and an evaluation step."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxtune.layers.cpu_bfloat16 import Compiled, Jitted, jit
from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.objectives.cross_entropy import NO_TERMS, LossTerms
from jaxtune.objectives.sft import BatchSums
from jaxtune.parallel.rules import constrain
from jaxtune.training.bad_steps import APPLIED, NO_GUARD, GuardSettings, check_step
from jaxtune.training.expert_load import load_summary
from jaxtune.training.state import TrainState

logger = logging.getLogger(__name__)

GIB = 2**30

Batch = Mapping[str, jax.Array]
Objective = Callable[
    [CausalLM, Batch, ForwardOptions, jax.Array | None, jax.Array | None], BatchSums
]


class StepSettings(NamedTuple):
    """Static settings of a training step.

    Attributes:
      accumulation: number of micro-batches per step.
      seed: random seed of dropout and noise.
      dropout: whether dropout or noise needs random keys.
      balance_loss: factor of the balance loss of a mixture of experts; 0 omits it.
      guard: conditions under which a step is skipped.
      terms: additional terms of the loss, for the metrics.
    """

    accumulation: int
    seed: int
    dropout: bool
    balance_loss: float = 0.0
    guard: GuardSettings = NO_GUARD
    terms: LossTerms = NO_TERMS


def make_train_step(
    definition: Definition,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    options: ForwardOptions,
    settings: StepSettings,
    like: TrainState,
) -> Jitted:
    """Builds the jitted step ``(state, base, constants, batch) → (state, metrics)``.

    The batch has [rows, T] arrays and is cut into `settings.accumulation` micro-batches of
    consecutive rows. Losses and gradients are summed over all micro-batches and divided once by
    the number of target tokens in the whole batch, so the result does not depend on the split,
    except for dropout of routed experts and of the LSTM encoder; see `_row_keys`. The state is
    donated.

    A step whose loss or gradient norm is not finite, or is a spike, is skipped: weights, moments
    and the step count keep their values. See `check_step`.

    Metrics are float32 scalars: ``loss`` (−log p, mean over target tokens), ``grad_norm`` (before
    clipping), ``learning_rate``, ``tokens`` (without padding), ``targets`` (tokens with a loss) and
    ``skipped`` (`APPLIED` or a key of `REASONS`). Terms of the loss with a factor are reported
    separately, without the factor: ``smoothing_loss``, ``z_loss`` and, for a mixture of experts,
    ``balance_loss`` (summed over layers) together with the values of `load_summary`.
    ``loss_scale`` is present where gradients are scaled.
    """
    differentiate = jax.grad(_make_loss(definition, objective, options, settings), has_aux=True)
    scaling, count = settings.guard.scaling, settings.accumulation

    def train_step(
        state: TrainState, base: Tree, constants: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def micro_batch(total: Tree, xs: tuple[jax.Array, Batch]) -> tuple[Tree, BatchSums]:
            index, micro = xs
            micro = {name: constrain(rows, "batch", "sequence") for name, rows in micro.items()}
            keys = _row_keys(settings, state.step, index, len(micro["tokens"]))
            scale = state.guard.scale if scaling else None
            gradient, sums = differentiate(state.trainable, base, constants, micro, keys, scale)
            return jax.tree.map(jnp.add, total, gradient), sums

        # [rows, T] → [accumulation, rows per micro-batch, T]. The scan carries the sum of gradients
        # and holds the activations of one micro-batch at a time; its outputs, the sums of each
        # micro-batch, are stacked on axis 0. A single micro-batch needs no loop.
        split = {name: rows.reshape(count, -1, rows.shape[-1]) for name, rows in batch.items()}
        zero = jax.tree.map(jnp.zeros_like, state.trainable)
        if count == 1:
            only = {name: rows[0] for name, rows in split.items()}
            gradient, sums = micro_batch(zero, (jnp.int32(0), only))
        else:
            gradient, each = lax.scan(micro_batch, zero, (jnp.arange(count), split))
            sums = jax.tree.map(lambda values: jnp.sum(values, axis=0), each)
        weight = jnp.maximum(sums.weight, 1.0)
        divisor = weight * state.guard.scale if scaling else weight
        gradient = jax.tree.map(lambda g: g / divisor, gradient)
        metrics = _metrics(settings, state, batch, gradient, sums, weight)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        loss = sums.loss / weight
        outcome, state = _apply(optimizer, settings, state, gradient, loss, metrics["grad_norm"])
        return state, metrics | {"skipped": outcome.astype(jnp.float32)}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _make_loss(
    definition: Definition, objective: Objective, options: ForwardOptions, settings: StepSettings
) -> Callable[..., tuple[jax.Array, BatchSums]]:
    """Returns the function to differentiate with respect to its first argument, the trainables.

    Its value is the loss summed over the targets of a micro-batch, times the loss scale, and its
    auxiliary output the unscaled `BatchSums`.
    """

    def loss_sum(
        trainable: Tree,
        base: Tree,
        constants: Tree,
        batch: Batch,
        key: jax.Array | None,
        scale: jax.Array | None,
    ) -> tuple[jax.Array, BatchSums]:
        model = definition.bind(base, trainable, constants)
        sums = objective(model, batch, options, key, scale)
        loss = sums.loss
        if settings.balance_loss and sums.experts is not None:
            loss = loss + settings.balance_loss * sums.experts.balance
        return loss if scale is None else loss * scale, sums

    return loss_sum


def _apply(
    optimizer: optax.GradientTransformation,
    settings: StepSettings,
    state: TrainState,
    gradient: Tree,
    loss: jax.Array,
    grad_norm: jax.Array,
) -> tuple[jax.Array, TrainState]:
    """Returns the outcome of `check_step` and the state after an applied or a skipped step."""

    def applied(gradient: Tree, state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = jax.tree.map(jnp.add, state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state, state.guard)

    def skipped(gradient: Tree, state: TrainState) -> TrainState:
        del gradient
        return state

    outcome, guard = check_step(state.guard, loss, grad_norm, settings.guard)
    state = dataclasses.replace(state, guard=guard)
    # A branch, because a select between the old and the new state would keep both in memory.
    return outcome, lax.cond(outcome == APPLIED, applied, skipped, gradient, state)


def _metrics(
    settings: StepSettings,
    state: TrainState,
    batch: Batch,
    gradient: Tree,
    sums: BatchSums,
    weight: jax.Array,
) -> dict[str, jax.Array]:
    """Returns the metrics of `make_train_step` but ``learning_rate`` and ``skipped``.

    `gradient` is the mean over targets, without the loss scale; `weight` is the number of targets.
    """
    metrics = {
        "loss": sums.nll / weight,
        "grad_norm": optax.tree.norm(gradient),
        "tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
        "targets": sums.weight,
    }
    if settings.terms.label_smoothing:
        metrics["smoothing_loss"] = sums.uniform / weight
    if settings.terms.z_loss:
        metrics["z_loss"] = sums.squared_norm / weight
    if sums.experts is not None:
        metrics |= load_summary(sums.experts.load)
        if settings.balance_loss:
            metrics["balance_loss"] = sums.experts.balance / weight
    if settings.guard.scaling:
        metrics["loss_scale"] = state.guard.scale
    return metrics


def _row_keys(
    settings: StepSettings, step: jax.Array, micro: jax.Array, rows: int
) -> jax.Array | None:
    """Returns the keys [rows] of a micro-batch, or None without dropout and noise.

    A key is a function of seed, step and the row's index in the batch: stable on resuming, and
    independent of the split. Dropout in adapters of routed experts and in the LSTM encoder has one
    key per micro-batch, which is that of its first row.
    """
    if not settings.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(settings.seed), step)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, micro * rows + jnp.arange(rows))


class CompiledStep:
    """A training step over a fixed base: ``(state, batch) → (state, metrics)``.

    The first call compiles it ahead of time and logs the memory that the compiler reports.
    """

    def __init__(
        self,
        step: Jitted,
        base: Tree,
        constants: Tree,
        put_batch: Callable[[Mapping[str, np.ndarray]], Batch],
    ):
        """Stores the arguments; nothing is compiled yet.

        Args:
          step: result of `make_train_step`.
          base: frozen tree.
          constants: constants of the method.
          put_batch: places a batch of NumPy arrays on the devices.
        """
        self._step, self._base, self._constants = step, base, constants
        self._put_batch = put_batch
        self._compiled: Compiled | None = None

    def __call__(
        self, state: TrainState, batch: Mapping[str, np.ndarray]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Runs a step on a batch of arrays int[rows, T]; the state is donated."""
        arguments = (state, self._base, self._constants, self._put_batch(batch))
        if self._compiled is None:
            start = time.monotonic()
            self._compiled = self._step.lower(*arguments).compile()
            memory = self._compiled.memory_analysis()
            logger.info(
                "compiled in %.1f s; each device holds %.2f GiB of arrays and %.2f GiB of "
                "temporaries",
                time.monotonic() - start,
                memory.argument_size_in_bytes / GIB,
                memory.temp_size_in_bytes / GIB,
            )
        return self._compiled(*arguments)


def make_eval_step(definition: Definition, objective: Objective, options: ForwardOptions) -> Jitted:
    """Builds the jitted ``(trainable, base, constants, batch) → BatchSums``, without dropout."""

    def eval_step(trainable: Tree, base: Tree, constants: Tree, batch: Batch) -> BatchSums:
        model = definition.bind(base, trainable, constants)
        return objective(model, batch, options._replace(remat="none"), None, None)

    return jit(eval_step)
