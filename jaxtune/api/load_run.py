"""Loads the model of a run as it was trained: same base and weight format, on a mesh that fits."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapters import Method, StoredAdapter, method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.method import NoMethod
from jaxtune.checkpoints.huggingface import choose_quantization
from jaxtune.checkpoints.load_model import LoadedModel, load_model
from jaxtune.checkpoints.merging import Merge, merge_adapter, merge_trained
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.stored_arrays import load_array
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.train import choose_method
from jaxtune.training.trained_arrays import trained_arrays


class LoadedRun(NamedTuple):
    """A run's model in memory.

    Attributes:
      setup: set-up of the run.
      parts: definition and arrays of the model.
    """

    setup: Setup
    parts: LoadedModel


def load_run(run: RunDirectory, config: Config, source: TensorSource, adapter: str) -> LoadedRun:
    """Loads a run's model over the same base that it was trained over, with its set-up.

    Args:
      run: a run with a saved step, or any run for the base model alone.
      config: config of the run; its mesh is fitted to the devices.
      source: the checkpoint from which the run started.
      adapter: "best", "last", or "none" for the base model alone.

    Raises:
      JaxtuneError: nothing has been saved yet.
    """
    method, _ = _choose(run, config, adapter)
    setup = set_up(config, source.config, method)
    return LoadedRun(setup, load_trained(run, config, source, adapter, setup.mesh))


def load_trained(
    run: RunDirectory, config: Config, source: TensorSource, adapter: str, mesh: Mesh
) -> LoadedModel:
    """Loads a run's model over the same base that it was trained over.

    Args:
      run: see `load_run`.
      config: config of the run.
      source: see `load_run`.
      adapter: see `load_run`.
      mesh: mesh on which arrays are placed.

    Raises:
      JaxtuneError: nothing has been saved yet.
    """
    method, stored = _choose(run, config, adapter)
    quantization = choose_quantization(config.quantize, source.config)
    dtype = config.training.dtype
    parts = load_model(source, dtype, mesh, method=method, quantization=quantization, stored=stored)
    if adapter == "none" or method.has_adapter:
        return parts
    like = parts.definition.abstract("trainable", mesh)
    trained = trained_arrays(run, like, adapter)
    return parts._replace(trainable=jax.tree.map(load_array, trained, like))


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
    definition = define(source.config, dtype, method, quantization)
    like = definition.abstract("trainable")
    return merge_trained(source, definition, trained_arrays(run, like, adapter))


def _choose(run: RunDirectory, config: Config, adapter: str) -> tuple[Method, StoredAdapter | None]:
    if adapter == "none":
        return NoMethod(), None
    method, _ = choose_method(config.adapter)
    if not method.has_adapter:
        return method, None
    stored = read_adapter(run.adapter(adapter))
    trained = method.with_stored(stored) if method.edits_base else method_from_peft(stored)
    return trained, stored
