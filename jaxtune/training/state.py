"""What a step of training reads and writes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.parallel.processes import put
from jaxtune.training.bad_steps import NO_GUARD, Guard, GuardSettings, first_guard


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "opt_state", "guard"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training, and all that a checkpoint has to hold of the arrays.

    Attributes:
      step: int32 scalar, updates made so far; one that was skipped does not count.
      trainable: float32 tree.
      opt_state: of the optax optimizer.
      guard: what bad updates are known by.
    """

    step: Any
    trainable: Tree
    opt_state: Any
    guard: Guard


def state_like(
    definition: Definition, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Describes the state: ShapeDtypeStructs with shardings.

    Moments lie where their weights do; what has another shape, as factored moments, on all devices.
    """
    trainable = definition.abstract("trainable", mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda moment, weight: placed(
            moment, weight.sharding if moment.shape == weight.shape else replicated
        ),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda leaf: placed(leaf, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    guard = jax.tree.map(
        lambda leaf: placed(leaf, replicated), jax.eval_shape(lambda: first_guard(NO_GUARD))
    )
    return TrainState(step, trainable, opt_state, guard)


def initial_state(
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    like: TrainState,
    guard: GuardSettings = NO_GUARD,
) -> TrainState:
    """Returns the state before the first update, placed as `like` says."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    trainable = jax.tree.map(put, trainable, shardings.trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    first = jax.tree.map(put, first_guard(guard), shardings.guard)
    return TrainState(put(jnp.int32(0), shardings.step), trainable, opt_state, first)
