"""A whole training run: from a config to a directory with metrics, checkpoints and adapter."""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtune.adapter_files.init_from import init_from
from jaxtune.adapter_files.peft import read_adapter, write_adapter_files
from jaxtune.adapters import Method, StoredAdapter, method_from_config, method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.adapters.method import is_adapterhub
from jaxtune.adapters.parameter_summary import parameter_summary, render
from jaxtune.atomic_files import write_files
from jaxtune.checkpoints.chat import Chat
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.open_model import open_model
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.data import BatchLoader, DataOrder, DataReader, Examples, Splits
from jaxtune.errors import JaxtuneError
from jaxtune.intervals import parse_interval
from jaxtune.layers.tree import Tree
from jaxtune.parallel.processes import fetch, leads, put
from jaxtune.runs.chat import (
    configured_chat,
    create_run_chat,
    initial_chat,
    reader_options,
    save_end_tokens,
)
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import check_wandb
from jaxtune.training.durations import Timeline
from jaxtune.training.early_stopping import check_metric
from jaxtune.training.evaluation import (
    bind_evaluation,
    held_out_batches,
    score_names,
)
from jaxtune.training.loop import fit
from jaxtune.training.out_of_memory import out_of_memory_named
from jaxtune.training.profile import profile_window
from jaxtune.training.run_summary import Split, describe
from jaxtune.training.score_experts import score_experts
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.update import Update

logger = logging.getLogger(__name__)


def train(
    config: Config | None, workdir: str | Path, *, clock: datetime.datetime | None = None
) -> RunDirectory:
    """Trains, or resumes the run in `workdir`.

    Args:
      config: resolved config of a new run; None resumes the existing run.
      workdir: the run's directory.
      clock: the time that the chat template of a new run prints; now by default.

    Returns:
      The run's directory, with everything in it.

    Raises:
      JaxtuneError: anything the user can mend; nothing half-written is left.
    """
    run = RunDirectory(workdir)
    with run.start(config) as config:
        check_wandb(config.logging.wandb)
        profile_window(config.profile.steps)
        source = open_model(config.model.path, config.model.revision).source
        chat = create_run_chat(run, config, initial_chat(config, source), clock)
        tokenizer, kept = chat.tokenizer, reader_options(config, chat)
        read = functools.cache(lambda: data_reader(config, source, tokenizer, **kept).splits())
        method, stored = choose_method(config)
        method = method.with_tokenizer(tokenizer)
        method = method.with_scores(lambda: _expert_scores(run, config, source, read))
        setup = set_up(config, source.config, method)
        _log_setup(setup)
        splits = read()
        examples, sets, held_out = splits.train, splits.sets, splits.held_out
        chat = save_end_tokens(run, chat, examples)
        _check_stopping(config, sets, setup)
        loader = make_loader(config, examples, setup.reserved)
        timeline = Timeline(loader.order)
        setup = setup.with_total_steps(timeline.total_steps(config.training))
        logger.info("training for %s", timeline.describe(setup.steps))
        if stored is None:
            stored = method.start(tokenizer, lambda: source.read("model.embed_tokens.weight"))
        parts = load_model(
            source,
            config.training.dtype,
            setup.mesh,
            method=method,
            quantization=setup.quantization,
            stored=stored,
            seed=config.training.seed,
        )
        for name, reason in parts.ignored.items():
            logger.info("not loaded: %s (%s)", name, reason)
        # The run begins here: what is wrong with its inputs has been found by now.
        run.check_fingerprint(fingerprint(source, tokenizer, examples, held_out))
        run.write_description(
            describe(
                setup,
                Split(examples, copy.copy(loader)),
                Split(held_out, held_out_batches(config, held_out, setup.reserved))
                if held_out
                else None,
            )
        )
        base = parts.base
        placed = setup.definition.abstract("constants", setup.mesh)
        constants = jax.tree.map(lambda x, like: put(x, like.sharding), parts.constants, placed)
        with jax.set_mesh(setup.mesh), out_of_memory_named(setup):
            fit(
                state=setup.initial_state(parts.trainable),
                step=Update(setup, base, constants),
                loader=loader,
                evaluate=bind_evaluation(setup, base, constants, sets, chat),
                save_adapter=_adapter_writer(setup, constants, chat),
                run=run,
                config=config,
                steps=setup.steps,
                timeline=timeline,
            )
    return run


def choose_method(config: Config) -> tuple[Method, StoredAdapter | None]:
    """Returns the method of a config, and the adapter to start from if it names one."""
    if not config.adapter.init_from:
        return method_from_config(config.adapter), None
    stored = read_adapter(config.adapter.init_from, encoder=True)
    method = method_from_peft(stored)
    if method.name != config.adapter.method:
        raise JaxtuneError(
            f"adapter.init_from holds a {method.name} adapter, not adapter.method="
            f"{config.adapter.method}"
        )
    return init_from(method, stored, config.adapter), stored


def _expert_scores(
    run: RunDirectory, config: Config, source: TensorSource, read: Callable[[], Splits]
) -> ExpertScores:
    """Returns the scores of the run that is here, or scores the data of a new one."""
    if not run.expert_scores.is_file():
        run.write_expert_scores(score_experts(config, source, read().train))
    return run.read_expert_scores()


def score_training_data(config: Config) -> ExpertScores:
    """Scores the experts of a config's model on its training data; see `score_experts`."""
    source = open_model(config.model.path, config.model.revision).source
    chat = configured_chat(config, source)
    splits = data_reader(config, source, chat.tokenizer, **reader_options(config, chat)).splits()
    return score_experts(config, source, splits.train)


def _log_setup(setup: Setup) -> None:
    mesh = {axis: size for axis, size in setup.mesh.shape.items() if size > 1} or "one device"
    logger.info("mesh: %s, attention: %s", mesh, setup.options.attention)
    logger.info("\n%s", render(parameter_summary(setup.definition)))


def data_reader(config: Config, source: TensorSource, tokenizer: Any, **options: Any) -> DataReader:
    """Returns what reads data as a config says; `options` are those of `DataReader`."""
    model = source.config
    options["max_positions"] = model.get("max_position_embeddings")
    return DataReader(config, tokenizer, model.get("vocab_size"), **options)


def _check_stopping(config: Config, sets: Mapping[str, Examples], setup: Setup) -> None:
    """Refuses to stop by what is never measured."""
    evaluation = config.evaluation
    never = not parse_interval("evaluation.every", evaluation.every).amount
    if evaluation.stop_patience and (not sets or never):
        missing = "evaluation.every is 0" if sets else "nothing is held out: set data.eval"
        raise JaxtuneError(f"evaluation.stop_patience={evaluation.stop_patience}: {missing}")
    if sets and not never:
        experts = bool(setup.definition.mixture_layers)
        check_metric(evaluation.stop_metric, score_names(config, sets, experts))


def make_loader(config: Config, examples: Examples, reserved: int = 0) -> BatchLoader:
    """Makes the endless stream of training batches; see `BatchLoader` for what is reserved."""
    settings = _order_settings(config)
    return BatchLoader(examples, **settings, reserved=reserved, mask_tokens=config.data.mask_tokens)


def make_order(config: Config, examples: Examples, reserved: int = 0) -> DataOrder:
    """Makes the order of the loader of `make_loader`, without hashing the examples."""
    return DataOrder(examples, **_order_settings(config), reserved=reserved)


def _order_settings(config: Config) -> dict[str, Any]:
    return {
        "batch_size": config.training.batch_size,
        "length": config.data.max_length,
        "packing": config.data.packing,
        "shuffle": config.data.shuffle,
        "seed": config.training.seed,
    }


def reserved_tokens(config: Config, model_config: Mapping[str, Any]) -> int:
    """Returns the tokens at the head of each example that the method of a config fills.

    Args:
      config: resolved.
      model_config: the content of the model's config.json.
    """
    method, _ = choose_method(config)
    if not hasattr(method, "virtual_tokens"):
        return 0
    return define(model_config, config.training.dtype, method).reserved


def _adapter_writer(
    setup: Setup, constants: Tree, chat: Chat
) -> Callable[[Tree, Path], Any] | None:
    """Returns what writes the adapter, or None where the whole model is trained."""
    if not setup.method.has_adapter:
        return None
    files = functools.cache(chat.files)  # a tokenizer takes far longer to save than to copy

    def write(trainable: Tree, directory: Path) -> None:
        trainable, whole = fetch(trainable), fetch(constants)
        if not leads():
            return
        stored = setup.method.store(setup.definition, trainable, whole)
        base = "model_name" if is_adapterhub(stored.config) else "base_model_name_or_path"
        stored.config[base] = setup.config.model.path
        write_adapter_files(directory, stored)
        write_files(directory, files())

    return write


def fingerprint(
    source: TensorSource, tokenizer: Any, examples: Examples, held_out: Examples | None
) -> dict[str, str]:
    """Returns hashes of all that a run depends on besides its config."""
    shapes = {name: source.shape(name) for name in source.names()}
    model = json.dumps([source.config, shapes], sort_keys=True, default=str)
    text = "" if tokenizer is None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "model": _hash(model),
        "tokenizer": _hash(text),
        "data.train": examples.fingerprint(),
        "data.eval": held_out.fingerprint() if held_out else "",
    }


def trained_arrays(run: RunDirectory, setup: Setup, which: str = "last") -> Tree:
    """Reads the trainables of an undamaged checkpoint of a run.

    Args:
      run: the run.
      setup: of the run.
      which: "last", or "best" for that of the best evaluation (the last where there was none).

    Raises:
      JaxtuneError: the run has no checkpoint yet.
    """
    with Checkpoints(run.checkpoints, run.read_config().checkpoint.keep) as checkpoints:
        step = checkpoints.latest_verified()
        if step is None:
            raise JaxtuneError(f"{run.path}: the run has no checkpoint yet")
        state, extra = checkpoints.restore(step, setup.like)
        best = extra["tally"]["best_step"]
        if which == "best" and best not in (None, step):
            state, _ = checkpoints.restore(best, setup.like)
    return state.trainable


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
