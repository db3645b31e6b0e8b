"""Loads the model of a run as it was trained: same base, weight format and mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapters import Method, StoredAdapter, method_from_peft
from jaxtune.adapters.method import NoMethod
from jaxtune.checkpoints.load_model import LoadedModel, load_model
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.runs.directory import RunDirectory
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
        parts = parts._replace(trainable=trained_arrays(run, setup, adapter))
    return LoadedRun(setup, parts)


def _choose(run: RunDirectory, config: Config, adapter: str) -> tuple[Method, StoredAdapter | None]:
    if adapter == "none":
        return NoMethod(), None
    method, _ = choose_method(config.adapter)
    if not method.has_adapter:
        return method, None
    stored = read_adapter(run.adapter(adapter))
    trained = method.with_stored(stored) if method.edits_base else method_from_peft(stored)
    return trained, stored
