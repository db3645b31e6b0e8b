"""Scores of a run on held-out examples, after the fact."""

from __future__ import annotations

from typing import Any

import jax

from jaxtune.adapters import method_from_peft
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.assemble import assemble
from jaxtune.checkpoints.peft import read_adapter
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError
from jaxtune.training.evaluation import bind_evaluation
from jaxtune.training.run import RunDirectory
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method, read_sets, trained_arrays


def evaluate(run: RunDirectory, adapter: str = "best", data: str = "") -> dict[str, Any]:
    """Evaluates what a run trained, on the run's own mesh.

    Args:
      run: a run that has saved something, or any run for the base model alone.
      adapter: "best", "last", or "none" for the base model.
      data: examples in any form that ``data.eval`` takes; empty: the run's ``data.eval``.

    Returns:
      What `bind_evaluation` says, without samples.

    Raises:
      JaxtuneError: no examples, or nothing saved yet.
    """
    config = run.read_config()
    location = huggingface.resolve_path(config.model.path, config.model.revision)
    source = huggingface.open_source(location)
    tokenizer = load_tokenizer(location)
    sets = read_sets(config, data or config.data.eval, source, tokenizer)
    if not sets:
        raise JaxtuneError(f"{run.path}: data.eval is empty: name the examples with --data FILE")
    # The base model is that of an adapter which has not begun to learn.
    method, stored = choose_method(config)[0], None
    if adapter != "none" and method.has_adapter:
        stored = read_adapter(run.adapter(adapter))
        method = method_from_peft(stored)
    method = method.with_scores(run.read_expert_scores)
    setup = set_up(config, source.config, method)
    parts = assemble(
        source,
        config.training.dtype,
        setup.mesh,
        method=method,
        quantization=setup.quantization,
        stored=stored,
    )
    saved = adapter != "none" and not method.has_adapter
    trainable = trained_arrays(run, setup, adapter) if saved else parts.trainable
    with jax.set_mesh(setup.mesh):
        scoring = bind_evaluation(setup, parts.base, parts.constants, sets, tokenizer)
        assert scoring is not None  # it is None without examples only
        scores = scoring(trainable)
    scores.pop("samples", None)
    return scores
