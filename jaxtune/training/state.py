"""The state of a training run on the devices."""

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
from jaxtune.training.bad_steps import NO_GUARD, Guard, GuardSettings, initial_guard


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "trainable", "opt_state", "guard"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays that change during training; a checkpoint holds all of them.

    Attributes:
      step: int32 scalar, number of applied steps; skipped steps are not counted.
      trainable: float32 tree of trainable weights.
      opt_state: state of the optax optimizer.
      guard: state of the check for bad steps.
    """

    step: Any
    trainable: Tree
    opt_state: Any
    guard: Guard


def state_like(
    definition: Definition, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, as ShapeDtypeStructs.

    A moment has the sharding of its weight. Optimizer arrays of other shapes, such as Adafactor's
    factored moments, are replicated.
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
        lambda leaf: placed(leaf, replicated), jax.eval_shape(lambda: initial_guard(NO_GUARD))
    )
    return TrainState(step, trainable, opt_state, guard)


def initial_state(
    trainable: Tree,
    optimizer: optax.GradientTransformation,
    like: TrainState,
    guard: GuardSettings = NO_GUARD,
) -> TrainState:
    """Returns the state before the first step, with the shardings of `like`."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    trainable = jax.tree.map(put, trainable, shardings.trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    first = jax.tree.map(put, initial_guard(guard), shardings.guard)
    return TrainState(put(jnp.int32(0), shardings.step), trainable, opt_state, first)
