"""The jitted steps: one update over accumulated micro-batches, and one batch of evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxtune.layers.decoder import CausalLM, ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.objectives.sft import BatchSums
from jaxtune.parallel.rules import constrain
from jaxtune.training.experts import load_summary
from jaxtune.training.state import TrainState

Batch = Mapping[str, jax.Array]
Objective = Callable[[CausalLM, Batch, ForwardOptions, jax.Array | None], BatchSums]


class StepSettings(NamedTuple):
    """What a training step is compiled for.

    Attributes:
      accumulation: micro-batches per update.
      seed: of dropout.
      dropout: whether anything is dropped, and so needs random keys.
      balance_loss: factor on the balance loss of a mixture of experts; 0 leaves it out.
    """

    accumulation: int
    seed: int
    dropout: bool
    balance_loss: float = 0.0


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

    Metrics are float32 scalars: ``loss`` (mean over target tokens), ``grad_norm`` (before
    clipping), ``learning_rate``, ``tokens`` (all but padding) and ``targets`` (those with a loss);
    of a mixture of experts also those of `load_summary` and, where it is trained on,
    ``balance_loss`` (summed over layers, without its factor; it is no part of ``loss``).
    """

    def loss_sum(
        trainable: Tree, base: Tree, constants: Tree, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, BatchSums]:
        model = definition.bind(base, trainable, constants)
        sums = objective(model, batch, options, key)
        if not settings.balance_loss or sums.experts is None:
            return sums.loss, sums
        return sums.loss + settings.balance_loss * sums.experts.balance, sums

    def summed_gradient(
        state: TrainState, base: Tree, constants: Tree, batch: Batch
    ) -> tuple[Tree, BatchSums]:
        differentiate = jax.grad(loss_sum, has_aux=True)

        def micro_batch(total: Tree, xs: Any) -> tuple[Tree, BatchSums]:
            index, micro = xs
            micro = {name: constrain(rows, "batch", "sequence") for name, rows in micro.items()}
            key = _dropout_key(settings, state.step, index)
            gradient, sums = differentiate(state.trainable, base, constants, micro, key)
            return jax.tree.map(jnp.add, total, gradient), sums

        count = settings.accumulation
        cut = {name: rows.reshape(count, -1, rows.shape[-1]) for name, rows in batch.items()}
        zero = jax.tree.map(jnp.zeros_like, state.trainable)
        if count == 1:
            first = {name: rows[0] for name, rows in cut.items()}
            return micro_batch(zero, (jnp.int32(0), first))
        gradient, each = lax.scan(micro_batch, zero, (jnp.arange(count), cut))
        return gradient, jax.tree.map(lambda sums: jnp.sum(sums, axis=0), each)

    def train_step(
        state: TrainState, base: Tree, constants: Tree, batch: Batch
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        gradient, sums = summed_gradient(state, base, constants, batch)
        weight = jnp.maximum(sums.weight, 1.0)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trainable)
        metrics = {
            "loss": sums.loss / weight,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "tokens": jnp.sum(batch["segment_ids"] != 0).astype(jnp.float32),
            "targets": sums.weight,
        }
        if sums.experts is not None:
            metrics |= load_summary(sums.experts.load)
            if settings.balance_loss:
                metrics["balance_loss"] = sums.experts.balance / weight
        trainable = jax.tree.map(jnp.add, state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def _dropout_key(settings: StepSettings, step: jax.Array, micro: jax.Array) -> jax.Array | None:
    if not settings.dropout:
        return None
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(settings.seed), step), micro)


def make_eval_step(definition: Definition, objective: Objective, options: ForwardOptions) -> Any:
    """Builds the jitted ``(trainable, base, constants, batch) → BatchSums``, without dropout."""

    @jax.jit
    def eval_step(trainable: Tree, base: Tree, constants: Tree, batch: Batch) -> BatchSums:
        model = definition.bind(base, trainable, constants)
        return objective(model, batch, options._replace(remat="none"), None)

    return eval_step
