"""The static half of a run, known before any weight is loaded.

`jaxtune plan` compiles it, and `jaxtune train` runs it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxtune.adapters.define import define
from jaxtune.adapters.method import Method
from jaxtune.checkpoints.huggingface import choose_quantization
from jaxtune.config import Config, TrainingConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.attention import choose_backend
from jaxtune.layers.cpu_bfloat16 import Jitted
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition, check_experts
from jaxtune.objectives.cross_entropy import LossTerms
from jaxtune.objectives.sft import sft_loss
from jaxtune.parallel.devices import DeviceGroup
from jaxtune.parallel.mesh import make_mesh, named_sharding
from jaxtune.parallel.processes import put
from jaxtune.quant import Quantization
from jaxtune.training.bad_steps import GuardSettings
from jaxtune.training.optimizer import make_optimizer, make_schedule
from jaxtune.training.placement.fit import batch_shares, fit_to_devices, split_of, with_accumulation
from jaxtune.training.placement.limits import check_activations, check_batch, check_state
from jaxtune.training.placement.memory import bytes_per_device, temporaries
from jaxtune.training.placement.split import BatchSplit, pad_rows
from jaxtune.training.state import TrainState, initial_state, state_like
from jaxtune.training.step import StepSettings, make_eval_step, make_train_step

BATCH_ARRAYS = ("tokens", "targets", "segment_ids", "positions")


@dataclasses.dataclass(frozen=True)
class Setup:
    """The static half of a run: everything but arrays.

    Attributes:
      config: resolved config, fitted to the devices: all sizes of the mesh and
        ``training.accumulation`` are positive.
      method: adapter method with its settings.
      definition: model definition with the method attached.
      quantization: quantization of the frozen weights, if any.
      mesh: mesh of devices.
      options: options of the forward pass.
      steps: number of steps of the run.
      schedule: learning-rate schedule.
      optimizer: gradient clipping and update rule.
      like: shapes, dtypes and shardings of the training state.
      notes: remarks for the log on how the config was fitted, one line each.
    """

    config: Config
    method: Method
    definition: Definition
    quantization: Quantization | None
    mesh: Mesh
    options: ForwardOptions
    steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    like: TrainState
    notes: tuple[str, ...] = ()

    @property
    def split(self) -> BatchSplit:
        """Split of a training batch into micro-batches and devices."""
        return split_of(self.config)

    @property
    def reserved(self) -> int:
        """Number of virtual tokens at the beginning of each example."""
        return self.definition.reserved

    @property
    def guard(self) -> GuardSettings:
        """Conditions under which a step is skipped."""
        training = self.config.training
        return GuardSettings(training.dtype == "float16", training.spike_factor)

    def with_total_steps(self, steps: int, warmup: int | None = None) -> Setup:
        """Returns a copy whose learning-rate schedule spans `steps` steps.

        Args:
          steps: number of steps of the run.
          warmup: number of warm-up steps; ``optimizer.warmup_steps`` by default.
        """
        if steps == self.steps and warmup is None and not _counts_data(self.config.training):
            return self
        settings = self.config.optimizer
        if warmup is not None:
            settings = dataclasses.replace(settings, warmup_steps=warmup)
        schedule = make_schedule(settings, steps)
        optimizer = make_optimizer(settings, self.definition.abstract("trainable"), schedule)
        return dataclasses.replace(self, steps=steps, schedule=schedule, optimizer=optimizer)

    def initial_state(self, trainable: Tree) -> TrainState:
        """Returns the state before the first step; see `initial_state`."""
        return initial_state(trainable, self.optimizer, self.like, self.guard)

    def train_step(self) -> Jitted:
        """Builds the jitted step; see `make_train_step`."""
        training = self.config.training
        terms = LossTerms(training.label_smoothing, training.z_loss)
        settings = StepSettings(
            accumulation=training.accumulation,
            seed=training.seed,
            dropout=self.method.dropout > 0 or training.neftune_alpha > 0,
            balance_loss=training.balance_loss,
            guard=self.guard,
            terms=terms,
        )
        return make_train_step(
            self.definition,
            functools.partial(sft_loss, terms=terms),
            self.optimizer,
            self.schedule,
            self.options,
            settings,
            self.like,
        )

    def eval_step(self) -> Jitted:
        """Builds the jitted evaluation step; see `make_eval_step`."""
        return make_eval_step(self.definition, sft_loss, self.options)

    def put_batch(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Places the `BATCH_ARRAYS` of a training batch, NumPy arrays int32[rows, T], on the mesh.

        Empty rows are appended if the devices and micro-batches need them.
        """
        return self._put({name: batch[name] for name in BATCH_ARRAYS}, self.split.padded_rows)

    def put_pieces(self, batch: Mapping[str, Any]) -> Iterator[dict[str, jax.Array]]:
        """Places a batch of any number of rows on the mesh, in pieces of the same shape.

        A piece has at most the rows of a micro-batch, and the last one may end with empty rows.
        """
        count, rows = self.split.pieces(len(batch[BATCH_ARRAYS[0]]))
        for start in range(0, count * rows, rows):
            piece = {name: batch[name][start : start + rows] for name in BATCH_ARRAYS}
            yield self._put(piece, rows)

    def _put(self, batch: Mapping[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
        padded = pad_rows(batch, rows)
        shape = padded[BATCH_ARRAYS[0]].shape
        sharding = named_sharding(self.mesh, ("batch", "sequence"), shape)
        return {name: put(array, sharding) for name, array in padded.items()}

    def temporaries(self, mesh: Mapping[str, int] | None = None) -> int:
        """Estimates the bytes per device of a step's intermediate arrays.

        Args:
          mesh: devices along each mesh axis; those of the setup by default.
        """
        mesh = dict(self.mesh.shape) if mesh is None else mesh
        split = self.split._replace(shares=batch_shares(mesh))
        length = (self.config.data.max_length + self.reserved) // mesh["sequence"]
        trainable = bytes_per_device(self.like.trainable, mesh)
        tokens = split.rows_per_device * length
        return temporaries(self.definition, self.options, mesh, tokens, trainable)

    def batch_like(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a training batch on the mesh, int32[rows, T], with shardings."""
        length = self.config.data.max_length + self.reserved
        shape = (self.split.padded_rows, length)
        sharding = named_sharding(self.mesh, ("batch", "sequence"), shape)
        return {
            name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for name in BATCH_ARRAYS
        }


def set_up(
    config: Config,
    model_config: Mapping[str, Any],
    method: Method,
    devices: Sequence[Any] | DeviceGroup | None = None,
) -> Setup:
    """Sets up a run without allocating arrays, and fits its config to the devices.

    Args:
      config: resolved config.
      model_config: content of the model's config.json.
      method: adapter method, or full fine-tuning.
      devices: devices to train on, or their description; all devices by default.

    Raises:
      JaxtuneError: settings do not fit the model, the method or the devices; the message names
        the key.
    """
    training = config.training
    quantization = choose_quantization(config.quantize, model_config)
    definition = define(model_config, training.dtype, method, quantization)
    if quantization is not None and not any(leaf.format for leaf in definition.leaves.values()):
        raise JaxtuneError(
            f"quantize.format={config.quantize.format}: adapter.method={method.name} trains all of "
            "quantize.modules, and trained weights cannot be quantized"
        )
    if training.balance_loss and not definition.mixture_layers:
        raise JaxtuneError(
            f"training.balance_loss={training.balance_loss:g} needs routed experts, and "
            f"{model_config.get('model_type')} has none"
        )
    if not isinstance(devices, DeviceGroup):
        devices = DeviceGroup.of(jax.devices() if devices is None else devices)
    config, notes = fit_to_devices(config, definition, devices)
    mesh = make_mesh(
        config.mesh.to_dict(), devices.count if devices.devices is None else devices.devices
    )
    check_experts(definition, mesh.shape)
    platform = devices.platform if devices.devices is None else devices.devices[0].platform
    prefix = definition.has_prefix
    backend = choose_backend(config.model.attention, platform, prefix)
    options = ForwardOptions(
        jnp.dtype(training.dtype), backend, training.remat, platform, training.neftune_alpha
    )
    provisional = _counts_data(training)
    schedule = make_schedule(config.optimizer, training.steps, provisional=provisional)
    optimizer = make_optimizer(config.optimizer, definition.abstract("trainable"), schedule)
    like = state_like(definition, optimizer, mesh)
    arrays = (like, definition.abstract("base", mesh), definition.abstract("constants", mesh))
    resident, trainable = bytes_per_device(arrays), bytes_per_device(like.trainable)
    return Setup(
        config=with_accumulation(config, definition, options, devices, mesh, resident, trainable),
        method=method,
        definition=definition,
        quantization=quantization,
        mesh=mesh,
        options=options,
        steps=training.steps,
        schedule=schedule,
        optimizer=optimizer,
        like=like,
        notes=tuple(notes),
    )


def check_memory(setup: Setup) -> None:
    """Raises if the arrays of a run certainly do not fit; see `placement.limits`.

    Not part of `set_up`, because a plan may be of devices that are too small, and an evaluation
    needs no optimizer state.
    """
    config = setup.config
    check_state(setup.definition, setup.method, setup.mesh, setup.like, config)
    rows, shared = config.training.batch_size, (config, setup.reserved, setup.mesh)
    check_batch("training.batch_size", rows, *shared)
    check_activations(setup.split.rows_per_device, setup.definition, config, setup.mesh)
    if config.data.eval or config.data.eval_split:
        check_batch("evaluation.batch_size", config.evaluation.batch_size, *shared)


def _counts_data(training: TrainingConfig) -> bool:
    """Returns whether the length is in epochs or tokens, so that the steps depend on the data."""
    return bool(training.epochs or training.tokens)
