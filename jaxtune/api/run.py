"""Training runs: start one, and look at what came out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtune import config as config_module
from jaxtune.adapters import Method
from jaxtune.api.loading import load
from jaxtune.api.model import Model
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.assemble import assemble
from jaxtune.checkpoints.replaced import trained
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.parallel.rules import MESH_AXES
from jaxtune.training import train as training
from jaxtune.training.run import RunDirectory
from jaxtune.training.setup import set_up


class Run:
    """A run on disk: its config, what it measured, and the model that came out of it."""

    def __init__(self, workdir: str | Path):
        """Opens the run in a directory.

        Raises:
          JaxtuneError: there is no run.
        """
        self.directory = RunDirectory(workdir)
        self.config = self.directory.read_config()

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.directory.path

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl: step, loss, learning_rate, grad_norm, tokens, …"""
        return _json_lines(self.directory.metrics)

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns the lines of evaluations.jsonl: step, loss, token_accuracy, tokens."""
        return _json_lines(self.directory.evaluations)

    def model(self, adapter: str = "best") -> Model:
        """Loads the model that the run trained.

        Args:
          adapter: "best" (by evaluation.stop_metric; the last where nothing was held out), "last",
            or "none" for the base model alone.

        Raises:
          JaxtuneError: nothing has been saved yet.
        """
        lookup(dict.fromkeys(("best", "last", "none")), adapter, "adapter")
        settings = self.config
        options: dict[str, Any] = {
            "dtype": settings.training.dtype,
            "revision": settings.model.revision,
            "attention": settings.model.attention,
            "quantize": settings.quantize.to_dict(),
        }
        if adapter == "none":
            return load(settings.model.path, **options)
        method, _ = training.choose_method(settings)
        if not method.has_adapter:
            return self._fully_trained(method, options, adapter)
        return load(settings.model.path, adapter=self.adapter_directory(adapter), **options)

    def adapter_directory(self, which: str = "best") -> Path:
        """Returns the directory of the best or last adapter, in PEFT's format.

        Raises:
          JaxtuneError: nothing has been saved yet, or the run trains every weight.
        """
        return self.directory.adapter(which)

    def _fully_trained(self, method: Method, options: Mapping[str, Any], which: str) -> Model:
        # One device, whatever the run had: a checkpoint restores onto any mesh.
        alone = [f"mesh.{axis}=1" for axis in MESH_AXES]
        config = config_module.resolve(self.config.to_dict(), alone)
        location = huggingface.resolve_path(config.model.path, config.model.revision)
        source = huggingface.open_source(location)
        setup = set_up(config, source.config, method, jax.devices()[:1])
        arrays = training.trained_arrays(self.directory, setup, which)
        # What is not trained, such as a router's correction bias, stays as it is in the checkpoint.
        source = trained(source, setup.definition, arrays)
        mesh, dtype = single_device_mesh(), options["dtype"]
        parts = assemble(source, dtype, mesh)
        return Model(parts, location, mesh, dtype=dtype, attention=options["attention"])


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train(config: Any = None, workdir: str | Path = "") -> Run:
    """Trains a model, or goes on with the run that is in `workdir`.

    Args:
      config: from `jaxtune.config.default`, a mapping of sections, or a path of a config file;
        None goes on with the run that is there.
      workdir: the run's directory: everything is written there.

    Raises:
      JaxtuneError: anything the user can mend.
    """
    if not str(workdir):
        raise JaxtuneError("workdir is empty: name a directory for the run")
    if isinstance(config, (str, Path)):
        config = config_module.load_file(config)
    training.train(None if config is None else config_module.resolve(config), workdir)
    return Run(workdir)
