"""A whole training run: from a config to a directory with metrics, checkpoints and adapter."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtune.adapters import Method, Stored, method_from_config, method_from_peft
from jaxtune.adapters.census import census, render
from jaxtune.adapters.method import is_adapterhub
from jaxtune.adapters.scores import ExpertScores
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.assemble import assemble
from jaxtune.checkpoints.orbax import Checkpoints
from jaxtune.checkpoints.peft import read_adapter, write_adapter_files
from jaxtune.checkpoints.source import TensorSource
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.data import DataReader, Examples, Loader, Splits, eval_batches
from jaxtune.errors import JaxtuneError
from jaxtune.layers.bits import as_bits
from jaxtune.layers.tree import Tree
from jaxtune.parallel.processes import fetch, leads, put
from jaxtune.training.describe import Split, describe
from jaxtune.training.expert_scores import score_experts
from jaxtune.training.experts import load_summary, load_table, mixture_layers
from jaxtune.training.loop import fit
from jaxtune.training.run import RunDirectory
from jaxtune.training.setup import Setup, set_up
from jaxtune.training.state import TrainState, initial_state

logger = logging.getLogger(__name__)


def train(config: Any, workdir: str | Path) -> RunDirectory:
    """Trains, or goes on with the run that is in `workdir`.

    Args:
      config: resolved config of a new run; None goes on with the one that is there.
      workdir: the run's directory.

    Returns:
      The run's directory, with everything in it.

    Raises:
      JaxtuneError: anything the user can mend; nothing half-written is left.
    """
    run = RunDirectory(workdir)
    with run.start(config) as config:
        location = huggingface.resolve_path(config.model.path, config.model.revision)
        source = huggingface.open_source(location)
        tokenizer = load_tokenizer(location)
        read = functools.cache(lambda: data_reader(config, source, tokenizer).splits())
        method, stored = choose_method(config)
        method = method.with_scores(lambda: _expert_scores(run, config, source, read))
        setup = set_up(config, source.config, method)
        _log_setup(setup)
        examples, held_out = read()
        if stored is None:
            stored = method.start(tokenizer, lambda: source.read("model.embed_tokens.weight"))
        parts = assemble(
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
                Split(examples, make_loader(config, examples, setup.reserved)),
                Split(held_out, held_out_batches(config, held_out, setup.reserved))
                if held_out
                else None,
            )
        )
        base = parts.base
        placed = setup.definition.abstract("constants", setup.mesh)
        constants = jax.tree.map(lambda x, like: put(x, like.sharding), parts.constants, placed)
        with jax.set_mesh(setup.mesh):
            fit(
                state=initial_state(parts.trainable, setup.optimizer, setup.like),
                step=bind_step(setup, base, constants),
                loader=make_loader(config, examples, setup.reserved),
                evaluate=bind_evaluation(setup, base, constants, held_out),
                save_adapter=_adapter_writer(setup, constants),
                run=run,
                config=config,
            )
    return run


def choose_method(config: Any) -> tuple[Method, Stored | None]:
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
    logger.info(
        "going on from %s, which brings its own settings: %s", config.adapter.init_from, method
    )
    return method, stored


def _expert_scores(
    run: RunDirectory, config: Any, source: TensorSource, read: Callable[[], Splits]
) -> ExpertScores:
    """Returns the scores of the run that is here, or scores the data of a new one."""
    if not run.expert_scores.is_file():
        run.write_expert_scores(score_experts(config, source, read().train))
    return run.read_expert_scores()


def score_training_data(config: Any) -> ExpertScores:
    """Scores the experts of a config's model on its training data; see `score_experts`."""
    location = huggingface.resolve_path(config.model.path, config.model.revision)
    source = huggingface.open_source(location)
    splits = data_reader(config, source, load_tokenizer(location)).splits()
    return score_experts(config, source, splits.train)


def _log_setup(setup: Setup) -> None:
    mesh = {axis: size for axis, size in setup.mesh.shape.items() if size > 1} or "one device"
    logger.info("mesh: %s, attention: %s", mesh, setup.options.attention)
    logger.info("\n%s", render(census(setup.definition)))


def data_reader(config: Any, source: TensorSource, tokenizer: Any, **options: Any) -> DataReader:
    """Returns what reads data as a config says; `options` are those of `DataReader`."""
    return DataReader(config, tokenizer, source.config.get("vocab_size"), **options)


def make_loader(config: Any, examples: Examples, reserved: int = 0) -> Loader:
    """Makes the endless stream of training batches; see `Loader` for what is reserved."""
    return Loader(
        examples,
        batch_size=config.training.batch_size,
        length=config.data.max_length,
        packing=config.data.packing,
        shuffle=config.data.shuffle,
        seed=config.training.seed,
        reserved=reserved,
        mask_tokens=config.data.mask_tokens,
    )


def held_out_batches(
    config: Any, examples: Examples, reserved: int = 0
) -> Iterator[Mapping[str, Any]]:
    """Returns the batches of one evaluation."""
    return eval_batches(
        examples,
        batch_size=config.evaluation.batch_size,
        length=config.data.max_length,
        packing=config.data.packing,
        reserved=reserved,
    )


def bind_step(
    setup: Setup, base: Tree, constants: Tree
) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Mapping[str, jax.Array]]]:
    """Returns the update as the loop calls it: ``(state, batch) → (state, metrics as scalars)``."""
    compiled, base = setup.train_step(), as_bits(base, setup.options.platform)
    return lambda state, batch: compiled(state, base, constants, setup.put_batch(batch))


def bind_evaluation(
    setup: Setup, base: Tree, constants: Tree, examples: Examples | None
) -> Callable[[Tree], dict[str, Any]] | None:
    """Returns the evaluation as the loop calls it, or None without a held-out set.

    Of a mixture of experts the scores have `load_summary`, ``balance_loss`` (summed over layers)
    and ``expert_load``, the table of `load_table`.
    """
    if examples is None:
        return None
    compiled, base = setup.eval_step(), as_bits(base, setup.options.platform)

    def evaluate(trainable: Tree) -> dict[str, Any]:
        total = None
        for batch in held_out_batches(setup.config, examples, setup.reserved):
            sums = compiled(trainable, base, constants, setup.put_batch(batch))
            sums = jax.device_get(fetch(sums))
            # Sums over a whole set in float64.
            sums = jax.tree.map(np.float64, sums)
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        assert total is not None  # a set is never empty
        scores: dict[str, Any] = {
            "loss": float(total.loss / total.weight),
            "token_accuracy": float(total.correct / total.weight),
            "tokens": float(total.weight),
        }
        if total.experts is None:
            return scores
        load = total.experts.load
        scores |= {name: float(value) for name, value in load_summary(load).items()}
        scores["balance_loss"] = float(total.experts.balance / total.weight)
        return scores | {"expert_load": load_table(load, mixture_layers(setup.definition))}

    return evaluate


def _adapter_writer(setup: Setup, constants: Tree) -> Callable[[Tree, Path], Any] | None:
    """Returns what writes the adapter, or None where the whole model is trained."""
    if not setup.method.has_adapter:
        return None

    def write(trainable: Tree, directory: Path) -> None:
        trainable, whole = fetch(trainable), fetch(constants)
        if not leads():
            return
        stored = setup.method.store(setup.definition, trainable, whole)
        base = "model_name" if is_adapterhub(stored.config) else "base_model_name_or_path"
        stored.config[base] = setup.config.model.path
        write_adapter_files(directory, stored)

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


def trained_arrays(run: RunDirectory, setup: Setup) -> Tree:
    """Reads the trainables of a run's newest undamaged checkpoint.

    Raises:
      JaxtuneError: the run has no checkpoint yet.
    """
    with Checkpoints(run.checkpoints, run.read_config().checkpoint.keep) as checkpoints:
        latest = checkpoints.latest_verified()
        if latest is None:
            raise JaxtuneError(f"{run.path}: the run has no checkpoint yet")
        state, _ = checkpoints.restore(latest, setup.like)
    return state.trainable


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
