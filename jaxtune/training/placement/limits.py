"""Refuses a run whose arrays certainly do not fit, before anything is allocated."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from jaxtune.adapters.method import Method
from jaxtune.config import Config
from jaxtune.models.definition import Definition
from jaxtune.parallel.memory import check_fits
from jaxtune.training.placement.memory import bytes_per_device
from jaxtune.training.state import TrainState

# Tokens, targets, segments and positions, int32 each.
_BATCH_BYTES_PER_TOKEN = 16


def check_state(
    definition: Definition, method: Method, mesh: Mesh, like: TrainState, config: Config
) -> None:
    """Raises if the model, its optimizer state and the gradient do not fit.

    Args:
      definition: definition of the model with the method attached.
      method: adapter method, or full fine-tuning.
      mesh: mesh of devices.
      like: shapes, dtypes and shardings of the training state.
      config: resolved config.

    Raises:
      JaxtuneError: the message names the option, the bytes needed and the bytes available.
    """
    # The norm of the gradient needs all of it at once.
    trained = bytes_per_device(like) + bytes_per_device(like.trainable)
    frozen = bytes_per_device(
        (definition.abstract("base", mesh), definition.abstract("constants", mesh))
    )
    option = f"adapter.method={method.name}"
    for name in ("rank", "virtual_tokens"):
        if hasattr(method, name):
            option = f"adapter.{name}={getattr(method, name)}"
    check_fits(f"{option}: the trained arrays, their gradient and optimizer state", mesh, trained)
    check_fits(f"model.path={config.model.path}: the frozen weights", mesh, frozen)
    what = f"model.path={config.model.path}, {option}: the weights and the training state"
    check_fits(what, mesh, trained + frozen)


def check_activations(rows: int, definition: Definition, config: Config, mesh: Mesh) -> None:
    """Raises if the hidden states of a micro-batch do not fit: the least that a step needs.

    Args:
      rows: rows of a micro-batch on each device.
      definition: definition of the model with the method attached.
      config: resolved config.
      mesh: mesh of devices.

    Raises:
      JaxtuneError: the message names the options, the bytes needed and the bytes available.
    """
    length = config.data.max_length
    tokens = rows * (length + definition.reserved) // mesh.shape["sequence"]
    # The input of a layer and its cotangent.
    size = 2 * tokens * definition.hidden_size * np.dtype(config.training.dtype).itemsize
    batch = config.training.batch_size
    what = f"training.batch_size={batch}, data.max_length={length}: the hidden states"
    check_fits(what, mesh, size)


def check_batch(option: str, rows: int, config: Config, reserved: int, mesh: Mesh) -> None:
    """Raises if a batch, which each process makes as a whole, does not fit its memory.

    Args:
      option: key of the option with the number of rows.
      rows: rows of the batch.
      config: resolved config.
      reserved: number of virtual tokens of each row.
      mesh: mesh of devices.

    Raises:
      JaxtuneError: the message names the options, the bytes needed and the bytes available.
    """
    length = config.data.max_length
    size = rows * (length + reserved) * _BATCH_BYTES_PER_TOKEN
    check_fits(f"{option}={rows}, data.max_length={length}: a batch", mesh, 0, host=size)
