"""Loads the model of a run as it was trained: same base, weight format and mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapters import Method, StoredAdapter, method_from_peft
from jaxtune.adapters.method import NoMethod
from jaxtune.checkpoints.huggingface import choose_quantization
from jaxtune.checkpoints.load_model import LoadedModel, load_model
from jaxtune.checkpoints.merging import Merge, merge_adapter, merge_trained
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.parallel.rules import MESH_AXES
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.stored_arrays import load_array
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.train import choose_method, trained_arrays


class LoadedRun(NamedTuple):
    """A run's model in memory.

    Attributes:
      setup: set-up of the run.
      parts: definition and arrays of the model.
    """

    setup: Setup
    parts: LoadedModel


def load_run(
    run: RunDirectory,
    config: Config,
    source: TensorSource,
    adapter: str,
    devices: Sequence[Any] | None = None,
) -> LoadedRun:
    """Loads a run's model over the same base that it was trained over.

    Args:
      run: a run with a saved step, or any run for the base model alone.
      config: config of the run, possibly with another mesh.
      source: the checkpoint from which the run started.
      adapter: "best", "last", or "none" for the base model alone.
      devices: devices to load onto; those of this process by default.

    Raises:
      JaxtuneError: nothing has been saved yet.
    """
    method, stored = _choose(run, config, adapter)
    setup = set_up(config, source.config, method, devices)
    parts = load_model(
        source,
        config.training.dtype,
        setup.mesh,
        method=method,
        quantization=setup.quantization,
        stored=stored,
    )
    if adapter != "none" and not method.has_adapter:
        stored_arrays = trained_arrays(run, setup, adapter)
        trained = jax.tree.map(load_array, stored_arrays, setup.like.trainable)
        parts = parts._replace(trainable=trained)
    return LoadedRun(setup, parts)


def merge_run(run: RunDirectory, config: Config, source: TensorSource, adapter: str) -> Merge:
    """Prepares the merge of what a run trained; no weight is read yet.

    Args:
      run: a run with a saved step.
      config: config of the run.
      source: the checkpoint from which the run started.
      adapter: "best" or "last".

    Raises:
      JaxtuneError: nothing has been saved yet, or the adapter cannot be merged.
    """
    method, stored = _choose(run, config, adapter)
    dtype, quantization = config.training.dtype, choose_quantization(config.quantize, source.config)
    if stored is not None:
        return merge_adapter(source, dtype, method, stored, quantization)
    # Trained arrays are read as they are stored, so that any devices will do.
    alone = config.replace(mesh=dict.fromkeys(MESH_AXES, 1))
    setup = set_up(alone, source.config, method, jax.devices()[:1])
    return merge_trained(source, setup.definition, trained_arrays(run, setup, adapter))


def _choose(run: RunDirectory, config: Config, adapter: str) -> tuple[Method, StoredAdapter | None]:
    if adapter == "none":
        return NoMethod(), None
    method, _ = choose_method(config.adapter)
    if not method.has_adapter:
        return method, None
    stored = read_adapter(run.adapter(adapter))
    trained = method.with_stored(stored) if method.edits_base else method_from_peft(stored)
    return trained, stored
