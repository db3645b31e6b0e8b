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


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "trainable", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training, and all that a checkpoint has to hold of the arrays.

    Attributes:
      step: int32 scalar, updates made so far.
      trainable: float32 tree.
      opt_state: of the optax optimizer.
    """

    step: Any
    trainable: Tree
    opt_state: Any


def state_like(
    definition: Definition, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Describes the state: ShapeDtypeStructs with shardings; moments lie where their weights do."""
    trainable = definition.abstract("trainable", mesh)
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda moment, weight: placed(moment, weight.sharding),
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda leaf: placed(leaf, replicated),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    return TrainState(step, trainable, opt_state)


def initial_state(
    trainable: Tree, optimizer: optax.GradientTransformation, like: TrainState
) -> TrainState:
    """Returns the state before the first update, placed as `like` says."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    trainable = jax.tree.map(put, trainable, shardings.trainable)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(trainable)
    return TrainState(put(jnp.int32(0), shardings.step), trainable, opt_state)
