"""Evaluation of a finished run on held-out examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtune.api.load_run import LoadedRun, load_run, merge_run
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.chat import Chat
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.data import Examples
from jaxtune.errors import JaxtuneError
from jaxtune.runs.base import open_base
from jaxtune.runs.chat import load_run_chat, reader_options
from jaxtune.runs.directory import RunDirectory
from jaxtune.training.evaluation import bind_evaluation
from jaxtune.training.train import data_reader


class _HeldOut(NamedTuple):
    """Held-out examples by the name of their set, and the chat format that decodes answers."""

    sets: Mapping[str, Examples]
    chat: Chat


def evaluate(
    run: RunDirectory,
    adapter: str = "best",
    data: str = "",
    *,
    generate: int | None = None,
    answer_all: bool = False,
) -> dict[str, Any]:
    """Evaluates the model that a run trained, on the run's own mesh.

    Args:
      run: a run with a saved step, or any run for the base model alone.
      adapter: "best", "last", or "none" for the base model.
      data: examples in any form that ``data.eval`` accepts; empty for the run's held-out examples.
      generate: number of prompts of each held-out set to answer; by default that of
        ``evaluation.generate``.
      answer_all: generates an answer to every held-out prompt, regardless of `generate`.

    Returns:
      The scores of `bind_evaluation`; with `answer_all` also ``samples``, one per prompt.

    Raises:
      JaxtuneError: there are no examples, or nothing has been saved yet.
    """
    config = run.read_config()
    if generate is not None:
        config = config.replace(evaluation={"generate": generate})
    source, held_out = _open(run, config, data)
    if answer_all:
        count = max(map(len, held_out.sets.values()))
        config = config.replace(evaluation={"generate": count})
    scores = _score(load_run(run, config, source, adapter), held_out)
    if not answer_all:
        scores.pop("samples", None)
    return scores


def merge_losses(run: RunDirectory, adapter: str, quantized: Path) -> dict[str, float]:
    """Measures the loss due to merging into quantized weights, on the run's held-out examples.

    The merge in 16 bits is computed from the checkpoint, one tensor at a time, and never written.

    Args:
      run: a run over a quantized base, with held-out examples.
      adapter: the merged adapter, "best" or "last".
      quantized: the merged checkpoint, in the format of the base.

    Returns:
      The loss (mean over target tokens, nats) ``with_adapter``, of the merge in the dtype of the
      run (``merged``), and of the checkpoint (``merged_quantized``).
    """
    config = run.read_config()
    source, held_out = _open(run, config)
    wide = merge_run(run, config, source, adapter).as_source()
    plain = config.replace(quantize={"format": ""})
    losses = {
        "with_adapter": _score(load_run(run, config, source, adapter), held_out)["loss"],
        "merged": _score(load_run(run, plain, wide, "none"), held_out)["loss"],
    }
    written = huggingface.open_source(quantized)
    scores = _score(load_run(run, config, written, "none"), held_out)
    return losses | {"merged_quantized": scores["loss"]}


def _open(run: RunDirectory, config: Config, data: str = "") -> tuple[TensorSource, _HeldOut]:
    """Returns the checkpoint of a run, and the examples of `data` or those that it held out."""
    section = config.data
    if not (data or section.eval or section.eval_split):  # before anything is read
        raise JaxtuneError(
            f"{run.path}: the run has no held-out examples (data.eval and data.eval_split are "
            "empty): name some with --data FILE"
        )
    source = open_base(run, config).source
    chat = load_run_chat(run, config, source)
    reader = data_reader(config, source, chat.tokenizer, **reader_options(config.data, chat))
    data = data or config.data.eval
    sets = reader.read_sets(data) if data else reader.splits().sets
    return source, _HeldOut(sets, chat)


def _score(trained: LoadedRun, held_out: _HeldOut) -> dict[str, Any]:
    setup, parts = trained
    with jax.set_mesh(setup.mesh):
        scoring = bind_evaluation(setup, parts.base, parts.constants, *held_out)
        assert scoring is not None  # None only without examples
        return scoring(parts.trainable)
