"""Scores of a run on held-out examples, after the fact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax

from jaxtune import config as config_module
from jaxtune.adapters.merge import edits
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.source import TensorSource
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.data import Examples
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import merge
from jaxtune.training.run import RunDirectory
from jaxtune.training.train import bind_evaluation, data_reader
from jaxtune.training.trained import Trained, load_trained


def evaluate(run: RunDirectory, adapter: str = "best", data: str = "") -> dict[str, Any]:
    """Evaluates what a run trained, on the run's own mesh.

    Args:
      run: a run that has saved something, or any run for the base model alone.
      adapter: "best", "last", or "none" for the base model.
      data: examples in any form that ``data.eval`` takes; empty: what the run holds out.

    Returns:
      ``loss`` (mean over target tokens, nats), ``perplexity``, ``token_accuracy`` (share of
      targets that are the likeliest token) and ``tokens`` (targets); of a mixture of experts also
      what `bind_evaluation` says of the routing.

    Raises:
      JaxtuneError: no examples, or nothing saved yet.
    """
    config = run.read_config()
    source, examples = _open(run, config, data)
    scores = _score(load_trained(run, config, source, adapter), examples)
    return {"loss": scores["loss"], "perplexity": math.exp(scores["loss"]), **scores}


def merge_losses(run: RunDirectory, adapter: str, quantized: Path) -> dict[str, float]:
    """Measures what merging into quantized weights has cost, on the run's held-out examples.

    The merge in 16 bits is loaded beside the model that it is made of, and never written.

    Args:
      run: a run over a quantized base, with ``data.eval``.
      adapter: "best" or "last": what was merged.
      quantized: the merged checkpoint, in the format of the base.

    Returns:
      The loss (mean over target tokens, nats) ``with_adapter``, of the merge in the dtype of the
      run (``merged``), and of the checkpoint (``merged_quantized``).
    """
    config = run.read_config()
    source, examples = _open(run, config)
    trained = load_trained(run, config, source, adapter)
    definition, parts = trained.setup.definition, trained.parts
    trees = parts.base, parts.trainable, parts.constants
    wide = huggingface.merged_source(
        source, definition, merge(*trees), edits(definition.bind(*trees))
    )
    plain = config_module.resolve(config.to_dict(), ["quantize.format="])
    losses = {
        "with_adapter": _score(trained, examples)["loss"],
        "merged": _score(load_trained(run, plain, wide, "none"), examples)["loss"],
    }
    del trained, parts, trees, wide
    written = huggingface.open_source(quantized)
    scores = _score(load_trained(run, config, written, "none"), examples)
    return losses | {"merged_quantized": scores["loss"]}


def _open(run: RunDirectory, config: Any, data: str = "") -> tuple[TensorSource, Examples]:
    """Returns the checkpoint of a run and the examples of `data`, or those that it held out."""
    location = huggingface.resolve_path(config.model.path, config.model.revision)
    source = huggingface.open_source(location)
    reader = data_reader(config, source, load_tokenizer(location))
    data = data or config.data.eval
    examples = reader.read(data) if data else reader.splits().held_out
    if examples is None:
        raise JaxtuneError(f"{run.path}: data.eval is empty: name the examples with --data FILE")
    return source, examples


def _score(trained: Trained, examples: Examples) -> dict[str, Any]:
    setup, parts = trained
    with jax.set_mesh(setup.mesh):
        scoring = bind_evaluation(setup, parts.base, parts.constants, examples)
        assert scoring is not None  # it is None without examples only
        return scoring(parts.trainable)
