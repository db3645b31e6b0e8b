"""Evaluation on held-out examples, during a run and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.checkpoints.chat import Chat
from jaxtune.config import Config, EvaluationConfig
from jaxtune.data import DataOrder, Examples, eval_batches, eval_order
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import Tree
from jaxtune.parallel.processes import fetch
from jaxtune.training.expert_load import load_summary, load_table
from jaxtune.training.generation_eval import answer_questions, average, read_questions
from jaxtune.training.placement.limits import check_batch
from jaxtune.training.scores import answer_scores
from jaxtune.training.setup import Setup


def held_out_batches(
    config: Config, examples: Examples, reserved: int = 0
) -> Iterator[Mapping[str, Any]]:
    """Returns the batches of one evaluation."""
    return eval_batches(
        examples,
        batch_size=config.evaluation.batch_size,
        length=config.data.max_length,
        packing=config.data.packing,
        reserved=reserved,
    )


def held_out_order(config: Config, examples: Examples, reserved: int = 0) -> DataOrder:
    """Returns the order of `held_out_batches`."""
    return eval_order(
        examples,
        batch_size=config.evaluation.batch_size,
        length=config.data.max_length,
        packing=config.data.packing,
        reserved=reserved,
    )


def bind_evaluation(
    setup: Setup,
    base: Tree,
    constants: Tree,
    sets: Mapping[str, Examples],
    chat: Chat | None = None,
) -> Callable[[Tree], dict[str, Any]] | None:
    """Returns the evaluation as a function ``trainable → scores``; None without held-out sets.

    Scores are ``loss`` (mean over target tokens, nats), ``perplexity``, ``token_accuracy`` (share
    of targets with the highest probability) and ``tokens`` (targets), over all sets together and
    for each named set, as in ``law/loss``. A mixture of experts adds `load_summary`,
    ``balance_loss`` (summed over layers) and ``expert_load``, the table of `load_table`.
    ``evaluation.generate`` adds those of `answer_scores` and ``samples``.

    Args:
      setup: setup of the run.
      base: frozen tree.
      constants: constants of the method.
      sets: held-out examples by name; a single set may have an empty name.
      chat: tokenizer and end tokens of generated answers.

    Raises:
      JaxtuneError: ``evaluation.generate`` without a tokenizer, or a batch that does not fit the
        memory of this machine.
    """
    if not sets:
        return None
    rows = setup.config.evaluation.batch_size
    check_batch("evaluation.batch_size", rows, setup.config, setup.reserved, setup.mesh)
    compiled = setup.eval_step()
    count = setup.config.evaluation.generate
    if count and (chat is None or chat.tokenizer is None):
        raise JaxtuneError("evaluation.generate needs a tokenizer, and the model has none")
    questions = {name: read_questions(examples, count) for name, examples in sets.items() if count}

    def summed(trainable: Tree, examples: Examples) -> Any:
        """Returns the `BatchSums` of a whole set, in float64."""
        total = None
        for batch in held_out_batches(setup.config, examples, setup.reserved):
            for piece in setup.put_pieces(batch):
                sums = jax.device_get(fetch(compiled(trainable, base, constants, piece)))
                sums = jax.tree.map(np.float64, sums)
                total = sums if total is None else jax.tree.map(np.add, total, sums)
        assert total is not None  # a set is never empty
        return total

    def evaluate(trainable: Tree) -> dict[str, Any]:
        sums = {name: summed(trainable, examples) for name, examples in sets.items()}
        total = jax.tree.map(lambda *each: np.sum(each, axis=0), *sums.values())
        scores = _scores(total)
        for name in filter(None, sums):
            scores |= {f"{name}/{score}": value for score, value in _scores(sums[name]).items()}
        if questions:
            assert chat is not None
            samples = answer_questions(setup, (base, trainable, constants), questions, chat)
            scores |= average(samples) | {"samples": samples}
        if total.experts is None:
            return scores
        load = total.experts.load
        scores |= {name: float(value) for name, value in load_summary(load).items()}
        scores["balance_loss"] = float(total.experts.balance / total.weight)
        return scores | {"expert_load": load_table(load, setup.definition.mixture_layers)}

    return evaluate


def score_names(section: EvaluationConfig, sets: Collection[str], experts: bool) -> list[str]:
    """Returns the names of the scores of `bind_evaluation` for an ``evaluation`` section."""
    names = ["loss", "perplexity", "token_accuracy"]
    names += answer_scores() if section.generate else []
    named = [f"{name}/{score}" for name in filter(None, sets) for score in names]
    return names + (["balance_loss"] if experts else []) + named


def _scores(sums: Any) -> dict[str, Any]:
    """Returns the scores of a `BatchSums` of float64 scalars."""
    loss = float(sums.nll / sums.weight)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # the largest exponent of float64
        "token_accuracy": float(sums.correct / sums.weight),
        "tokens": float(sums.weight),
    }
