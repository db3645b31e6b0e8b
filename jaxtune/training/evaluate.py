"""Scores of a run on held-out examples, after the fact."""

from __future__ import annotations

import math
from typing import Any

import jax

from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError
from jaxtune.training.run import RunDirectory
from jaxtune.training.train import bind_evaluation, read_examples
from jaxtune.training.trained import load_trained


def evaluate(run: RunDirectory, adapter: str = "best", data: str = "") -> dict[str, Any]:
    """Evaluates what a run trained, on the run's own mesh.

    Args:
      run: a run that has saved something, or any run for the base model alone.
      adapter: "best", "last", or "none" for the base model.
      data: examples in any form that ``data.eval`` takes; empty: the run's ``data.eval``.

    Returns:
      ``loss`` (mean over target tokens, nats), ``perplexity``, ``token_accuracy`` (share of
      targets that are the likeliest token) and ``tokens`` (targets); of a mixture of experts also
      what `bind_evaluation` says of the routing.

    Raises:
      JaxtuneError: no examples, or nothing saved yet.
    """
    config = run.read_config()
    location = huggingface.resolve_path(config.model.path, config.model.revision)
    source = huggingface.open_source(location)
    examples = read_examples(config, data or config.data.eval, source, load_tokenizer(location))
    if examples is None:
        raise JaxtuneError(f"{run.path}: data.eval is empty: name the examples with --data FILE")
    setup, parts = load_trained(run, config, source, adapter)
    with jax.set_mesh(setup.mesh):
        scoring = bind_evaluation(setup, parts.base, parts.constants, examples)
        assert scoring is not None  # it is None without examples only
        scores = scoring(parts.trainable)
    return {"loss": scores["loss"], "perplexity": math.exp(scores["loss"]), **scores}
