"""The jitted steps: one update over accumulated micro-batches, and one batch of evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxtune.layers.cpu_bfloat16 import jit
from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.objectives.cross_entropy import NO_TERMS, LossTerms
from jaxtune.objectives.sft import BatchSums
from jaxtune.parallel.rules import constrain
from jaxtune.training.bad_steps import MADE, NO_GUARD, GuardSettings, judge
from jaxtune.training.expert_load import load_summary
from jaxtune.training.state import TrainState

Batch = Mapping[str, jax.Array]
Objective = Callable[
    [CausalLM, Batch, ForwardOptions, jax.Array | None, jax.Array | None], BatchSums
]


class StepSettings(NamedTuple):
    """What a training step is compiled for.

    Attributes:
      accumulation: micro-batches per update.
      seed: of dropout and noise.
      dropout: whether anything is dropped or made noisy, and so needs random keys.
      balance_loss: factor on the balance loss of a mixture of experts; 0 leaves it out.
      guard: which updates are not made.
      terms: of the loss, to be reported.
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
) -> Any:
    """Builds the jitted update ``(state, base, constants, batch) → (state, metrics)``.

    The batch has [rows, T] arrays and is cut into `settings.accumulation` micro-batches of
    consecutive rows. Losses and gradients are summed over all of them, and divided once by the
    number of target tokens in the whole batch, so the split changes nothing. The state is donated.

    An update whose loss or gradient norm is not finite, or a spike, is not made: weights, moments
    and the count of updates stay as they are. See `judge`.

    Metrics are float32 scalars: ``loss`` (−log p, mean over target tokens), ``grad_norm`` (before
    clipping), ``learning_rate``, ``tokens`` (all but padding), ``targets`` (those with a loss) and
    ``skipped`` (`MADE` or a key of `REASONS`). Terms of the loss that have a factor are reported
    beside it and without it: ``smoothing_loss``, ``z_loss``, and of a mixture of experts
    ``balance_loss`` (summed over layers), beside the numbers of `load_summary`. ``loss_scale`` is
    there where gradients are scaled.
    """
    guarded = settings.guard

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

    def summed_gradient(
        state: TrainState, base: Tree, constants: Tree, batch: Batch
    ) -> tuple[Tree, BatchSums]:
        differentiate = jax.grad(loss_sum, has_aux=True)

        def micro_batch(total: Tree, xs: Any) -> tuple[Tree, BatchSums]:
            index, micro = xs
            micro = {name: constrain(rows, "batch", "sequence") for name, rows in micro.items()}
            key = _dropout_key(settings, state.step, index)
            scale = state.guard.scale if guarded.scaling else None
            gradient, sums = differentiate(state.trainable, base, constants, micro, key, scale)
            return jax.tree.map(jnp.add, total, gradient), sums

        count = settings.accumulation
        cut = {name: rows.reshape(count, -1, rows.shape[-1]) for name, rows in batch.items()}
        zero = jax.tree.map(jnp.zeros_like, state.trainable)
        if count == 1:
            first = {name: rows[0] for name, rows in cut.items()}
            return micro_batch(zero, (jnp.int32(0), first))
        gradient, each = lax.scan(micro_batch, zero, (jnp.arange(count), cut))
        return gradient, jax.tree.map(lambda sums: jnp.sum(sums, axis=0), each)

    def updated(gradient: Tree, state: TrainState) -> TrainState:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        trainable = jax.tree.map(jnp.add, state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state, state.guard)

    def train_step(
        state: TrainState, base: Tree, constants: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, sums = summed_gradient(state, base, constants, batch)
        weight = jnp.maximum(sums.weight, 1.0)
        divisor = weight * state.guard.scale if guarded.scaling else weight
        gradient = jax.tree.map(lambda g: g / divisor, gradient)
        metrics = {
            "loss": sums.nll / weight,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
            "targets": sums.weight,
        }
        metrics |= _terms(settings, sums, weight)
        if guarded.scaling:
            metrics["loss_scale"] = state.guard.scale
        verdict, guard = judge(state.guard, sums.loss / weight, metrics["grad_norm"], guarded)
        state = dataclasses.replace(state, guard=guard)
        # A branch and not a choice between two states, for which both would have to be held.
        state = lax.cond(verdict == MADE, updated, lambda _, state: state, gradient, state)
        return state, metrics | {"skipped": verdict.astype(jnp.float32)}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _terms(settings: StepSettings, sums: BatchSums, weight: jax.Array) -> dict[str, jax.Array]:
    """Returns the parts of the loss beside −log p, without their factors, as metrics."""
    metrics: dict[str, jax.Array] = {}
    if settings.terms.label_smoothing:
        metrics["smoothing_loss"] = sums.uniform / weight
    if settings.terms.z_loss:
        metrics["z_loss"] = sums.squared_norm / weight
    if sums.experts is not None:
        metrics |= load_summary(sums.experts.load)
        if settings.balance_loss:
            metrics["balance_loss"] = sums.experts.balance / weight
    return metrics


def _dropout_key(settings: StepSettings, step: jax.Array, micro: jax.Array) -> jax.Array | None:
    if not settings.dropout:
        return None
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), step), micro)


def make_eval_step(definition: Definition, objective: Objective, options: ForwardOptions) -> Any:
    """Builds the jitted ``(trainable, base, constants, batch) → BatchSums``, without dropout."""

    @jit
    def eval_step(trainable: Tree, base: Tree, constants: Tree, batch: Batch) -> BatchSums:
        model = definition.bind(base, trainable, constants)
        return objective(model, batch, options._replace(remat="none"), None, None)

    return eval_step
