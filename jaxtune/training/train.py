"""A training run: from a config to a directory with metrics, checkpoints and an adapter."""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import jax

from jaxtune.adapter_files import refused_exports
from jaxtune.adapter_files.init_from import init_from
from jaxtune.adapter_files.peft import read_adapter, write_adapter_files
from jaxtune.adapters import Method, StoredAdapter, method_from_config, method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.adapters.method import is_adapterhub
from jaxtune.adapters.parameter_summary import parameter_summary, render
from jaxtune.atomic_files import write_files
from jaxtune.checkpoints.chat import Chat
from jaxtune.checkpoints.load_model import LoadedModel, load_model
from jaxtune.checkpoints.open_model import open_model
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import AdapterConfig, Config, EvaluationConfig
from jaxtune.data import BatchLoader, DataOrder, DataReader, Examples, ReaderOptions, Splits
from jaxtune.data.passes import OrderOptions
from jaxtune.data.splits import check_sources
from jaxtune.errors import JaxtuneError
from jaxtune.intervals import parse_interval
from jaxtune.layers.tree import Tree
from jaxtune.parallel.processes import agree, fetch, leads, put
from jaxtune.runs.changes import Changes
from jaxtune.runs.chat import (
    chat_content,
    configured_chat,
    create_run_chat,
    initial_chat,
    learned_end_tokens,
    reader_options,
)
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.metrics import check_wandb
from jaxtune.runs.review import Review
from jaxtune.training.continue_from import (
    check_seed,
    check_source_config,
    check_source_run,
    continued_chat,
    continued_state,
    source_run,
)
from jaxtune.training.durations import Timeline
from jaxtune.training.evaluation import (
    bind_evaluation,
    held_out_batches,
    score_names,
)
from jaxtune.training.length import check_length, with_length
from jaxtune.training.loop.callbacks import Callback, check_callbacks
from jaxtune.training.loop.early_stopping import check_metric
from jaxtune.training.loop.profile import profile_window
from jaxtune.training.loop.trainer import Trainer
from jaxtune.training.out_of_memory import out_of_memory_named
from jaxtune.training.run_summary import SplitSummary, summarize
from jaxtune.training.score_experts import score_experts
from jaxtune.training.setup import Setup, check_memory, set_up
from jaxtune.training.step import CompiledStep
from jaxtune.training.verification import Verification, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def train(
    config: Config | None,
    workdir: str | Path,
    *,
    clock: datetime.datetime | None = None,
    rows: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    accept_changes: Collection[str] = (),
) -> RunDirectory:
    """Trains a new run, or resumes the run in `workdir`.

    Args:
      config: resolved config of a new run; None resumes the existing run.
      workdir: directory of the run.
      clock: date and time that the chat template of a new run prints; now by default.
      rows: rows in memory by their entry in ``data.train`` or ``data.eval``; see `find_sources`.
      callbacks: callbacks, called in this order.
      accept_changes: keys of changes with which a run is resumed although it does not continue
        exactly; see `Review`.

    Returns:
      The directory of the run, with all its files.

    Raises:
      JaxtuneError: an error that the user can fix; no incomplete file is left behind.
    """
    if not str(workdir):
        raise JaxtuneError("workdir is empty: name a directory for the run")
    check_callbacks(callbacks)
    run = RunDirectory(workdir)
    review = Review(run.path, accept_changes)
    with run.start(config, review) as config, contextlib.ExitStack() as checks:
        changes = run.changes(config)
        _check_options(run, config, changes)
        verification = checks.enter_context(Verification(run, config, review))
        source = verification.model.source
        check_sources(config.data, rows)
        base = _initial_chat(run, config, source)
        chat = create_run_chat(run, config, base, clock, anew=review.renews_chat())
        tokenizer = chat.tokenizer
        options = reader_options(config.data, chat) | {"rows": rows}
        read = functools.cache(lambda: data_reader(config, source, tokenizer, **options).splits())
        method, stored = choose_method(config.adapter)
        method = method.with_tokenizer(tokenizer)
        method = method.with_scores(lambda: _expert_scores(run, config, source, read))
        setup = set_up(config, source.config, method)
        check_memory(setup)
        _log_setup(setup)
        splits = read()
        ends = learned_end_tokens(chat, splits.train)
        chat, stored_chat = chat.ending_with(ends), chat_content(chat, ends)
        _check_stopping(config.evaluation, splits.sets, setup)
        loader = make_loader(config, splits.train, setup.reserved)
        timeline = Timeline(loader.order)
        setup = with_length(setup, run, timeline, changes)
        logger.info("training for %s", timeline.describe(setup.steps))
        inputs = fingerprint(source, tokenizer, splits.train, splits.held_out)
        verification.check_inputs(inputs, stored_chat)
        check_seed(setup, changes)
        if not run.steps_done():
            check_source_run(setup, inputs)
        model = _load(setup, source, stored, tokenizer)
        # Recorded only now, so that a run whose inputs have errors can be started again.
        run.record(verification.finish(setup.config), changes, review.accepted, stored_chat)
        checks.close()
        _write_summary(run, setup, splits.train, splits.held_out, loader)
        with jax.set_mesh(setup.mesh), out_of_memory_named(setup):
            functions = _functions(setup, model, splits, chat)
            trainer = _trainer(run, config, setup, loader, timeline, callbacks, functions)
            trainer.fit(setup.initial_state(model.trainable))
    return run


def _initial_chat(run: RunDirectory, config: Config, source: TensorSource) -> Chat:
    """Returns the chat format that a run starts from; a new run may take that of another run."""
    base = initial_chat(config.adapter, source)
    return base if run.chat.is_file() else continued_chat(config, base, source)


def _check_options(run: RunDirectory, config: Config, changes: Changes) -> None:
    """Checks what the config alone decides, before anything is read."""
    check_length(run, config, changes)
    check_wandb(config.logging.wandb)
    profile_window(config.profile.steps)
    if not run.steps_done():
        check_source_config(config)


class _Functions(TypedDict):
    """The fields of `Trainer` that depend on the model."""

    step: Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]
    evaluate: Callable[[Any], Mapping[str, Any]] | None
    save_adapter: Callable[[Any, Path], Any] | None


def _functions(setup: Setup, model: LoadedModel, splits: Splits, chat: Chat) -> _Functions:
    like = setup.definition.abstract("constants", setup.mesh)
    constants = jax.tree.map(lambda x, like: put(x, like.sharding), model.constants, like)
    return {
        "step": CompiledStep(setup.train_step(), model.base, constants, setup.put_batch),
        "evaluate": bind_evaluation(setup, model.base, constants, splits.sets, chat),
        "save_adapter": _adapter_writer(setup, constants, chat),
    }


def _trainer(
    run: RunDirectory,
    config: Config,
    setup: Setup,
    loader: BatchLoader,
    timeline: Timeline,
    callbacks: Sequence[Callback],
    functions: _Functions,
) -> Trainer:
    return Trainer(
        **functions,
        loader=loader,
        run=run,
        config=config,
        steps=setup.steps,
        timeline=timeline,
        callbacks=callbacks,
        begin=continued_state(setup),
        moved=run.order_changed(),
    )


def _load(
    setup: Setup,
    source: TensorSource,
    stored: StoredAdapter | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> LoadedModel:
    """Loads the base model of a run, with `stored` or the method's own initial adapter."""
    if stored is None:
        embeddings = functools.partial(source.read, "model.embed_tokens.weight")
        stored = setup.method.start(tokenizer, embeddings)
    training = setup.config.training
    model = load_model(
        source,
        training.dtype,
        setup.mesh,
        method=setup.method,
        quantization=setup.quantization,
        stored=stored,
        seed=training.seed,
    )
    for name, reason in model.ignored.items():
        logger.info("not loaded: %s (%s)", name, reason)
    return model


def _write_summary(
    run: RunDirectory,
    setup: Setup,
    train: Examples,
    held_out: Examples | None,
    loader: BatchLoader,
) -> None:
    """Writes description.json; see `summarize`."""
    evaluation = None
    if held_out:
        evaluation = SplitSummary(
            held_out, held_out_batches(setup.config, held_out, setup.reserved)
        )
    # A copy of the loader: the run starts at its first batch.
    training = SplitSummary(train, copy.copy(loader))
    run.write_description(summarize(setup, training, evaluation))


def choose_method(section: AdapterConfig) -> tuple[Method, StoredAdapter | None]:
    """Returns the method of an ``adapter`` section, and the adapter of ``init_from``, if any."""
    if not section.init_from:
        return method_from_config(section), None
    stored = read_adapter(section.init_from, encoder=True)
    method = method_from_peft(stored)
    if method.name != section.method:
        raise JaxtuneError(
            f"adapter.init_from holds a {method.name} adapter, not adapter.method={section.method}"
        )
    return init_from(method, stored, section), stored


def _expert_scores(
    run: RunDirectory, config: Config, source: TensorSource, read: Callable[[], Splits]
) -> ExpertScores:
    """Returns the expert scores of the run; a new run computes and stores them first."""
    # A process that is late would see the file of process 0 and leave out the collectives.
    if agree(not run.expert_scores.is_file()):
        if config.training.continue_from:
            run.write_expert_scores(source_run(config).run.read_expert_scores())
        else:
            run.write_expert_scores(score_experts(config, source, read().train))
    return run.read_expert_scores()


def score_training_data(config: Config) -> ExpertScores:
    """Scores the experts of the model of a config on its training data; see `score_experts`."""
    source = open_model(config.model.path, config.model.revision).source
    chat = configured_chat(config, source)
    splits = data_reader(
        config, source, chat.tokenizer, **reader_options(config.data, chat)
    ).splits()
    return score_experts(config, source, splits.train)


def _log_setup(setup: Setup) -> None:
    mesh = {axis: size for axis, size in setup.mesh.shape.items() if size > 1} or "one device"
    for note in setup.notes:
        logger.info(note)
    if warning := setup.split.warning():
        logger.warning(warning)
    split, attention = setup.split, setup.options.attention
    logger.info(
        "mesh: %s, %d micro-batch(es) of %d row(s), attention: %s",
        *(mesh, split.accumulation, split.micro_rows, attention),
    )
    logger.info("\n%s", render(parameter_summary(setup.definition)))
    for name, reason in refused_exports(setup.method, setup.definition).items():
        logger.info("jaxtune export --format %s will not be possible: %s", name, reason)


def data_reader(
    config: Config,
    source: TensorSource,
    tokenizer: PreTrainedTokenizerBase | None,
    **options: Unpack[ReaderOptions],
) -> DataReader:
    """Returns the `DataReader` of a config for a model; `options` are those of `DataReader`."""
    model = source.config
    positions = model.get("max_position_embeddings")
    return DataReader(
        config, tokenizer, model.get("vocab_size"), max_positions=positions, **options
    )


def _check_stopping(
    evaluation: EvaluationConfig, sets: Mapping[str, Examples], setup: Setup
) -> None:
    """Raises if early stopping depends on a score that is never computed."""
    never = not parse_interval("evaluation.every", evaluation.every).amount
    if evaluation.stop_patience and (not sets or never):
        missing = "evaluation.every is 0" if sets else "nothing is held out: set data.eval"
        raise JaxtuneError(f"evaluation.stop_patience={evaluation.stop_patience}: {missing}")
    if sets and not never:
        experts = bool(setup.definition.mixture_layers)
        check_metric(evaluation.stop_metric, score_names(evaluation, sets, experts))


def make_loader(config: Config, examples: Examples, reserved: int = 0) -> BatchLoader:
    """Returns the endless stream of training batches; see `BatchLoader` for `reserved`."""
    return BatchLoader(
        examples,
        **_order_options(config),
        reserved=reserved,
        mask_tokens=config.data.mask_tokens,
    )


def make_order(config: Config, examples: Examples, reserved: int = 0) -> DataOrder:
    """Returns the order of `make_loader`'s batches, without hashing the examples."""
    return DataOrder(examples, **_order_options(config), reserved=reserved)


def _order_options(config: Config) -> OrderOptions:
    return {
        "batch_size": config.training.batch_size,
        "length": config.data.max_length,
        "packing": config.data.packing,
        "shuffle": config.data.shuffle,
        "seed": config.training.seed,
    }


def reserved_tokens(config: Config, model_config: Mapping[str, Any]) -> int:
    """Returns the number of virtual tokens that the method of a config adds to each example.

    Args:
      config: resolved config.
      model_config: content of the model's config.json.
    """
    method, _ = choose_method(config.adapter)
    if not hasattr(method, "virtual_tokens"):
        return 0
    return define(model_config, config.training.dtype, method).reserved


def _adapter_writer(
    setup: Setup, constants: Tree, chat: Chat
) -> Callable[[Tree, Path], Any] | None:
    """Returns a function that exports the adapter, or None for full fine-tuning."""
    if not setup.method.has_adapter:
        return None
    files = functools.cache(chat.files)  # serializing the tokenizer is slow; done once

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
