"""``training.continue_from``: a new run that starts from the state of another one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxtune.checkpoints.chat import Chat
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import Config
from jaxtune.errors import JaxtuneError
from jaxtune.runs.changes import describe, find_changes
from jaxtune.runs.chat import load_run_chat
from jaxtune.runs.checkpoints import Checkpoints
from jaxtune.runs.directory import RunDirectory
from jaxtune.runs.paths import with_absolute_paths
from jaxtune.runs.record import read_record
from jaxtune.training.optimizer import make_optimizer
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState, state_like

logger = logging.getLogger(__name__)

# What shapes and meaning of the optimizer's state depend on.
_STATE_OPTIONS = ("optimizer.name", "optimizer.moment_dtype")
_FREE = ("adapter.dropout",)


class SourceRun(NamedTuple):
    """The run that another one continues; it is only read.

    Attributes:
      run: its directory.
      config: its config.
      step: step of the checkpoint.
    """

    run: RunDirectory
    config: Config
    step: int


def source_run(config: Config) -> SourceRun:
    """Returns the run and the checkpoint of ``training.continue_from``.

    Args:
      config: config of the new run, in which it names a checkpoint; see `with_checkpoint`.

    Raises:
      JaxtuneError: the run does not exist any more.
    """
    checkpoint = Path(config.training.continue_from)
    run = RunDirectory(checkpoint.parents[1])
    return SourceRun(run, run.read_config(), int(checkpoint.name))


def check_source_config(config: Config) -> None:
    """Raises if the config of a new run does not fit the state of ``training.continue_from``.

    Raises:
      JaxtuneError: the adapter or the optimizer differs; the message lists the differences.
    """
    if not config.training.continue_from:
        return
    source = source_run(config)
    changes = {
        key: pair
        for key, pair in find_changes(with_absolute_paths(source.config), config).items()
        if key in _STATE_OPTIONS or (key.startswith("adapter.") and key not in _FREE)
    }
    if changes:
        raise JaxtuneError(
            f"training.continue_from={source.run.path}: must be as in that run: {describe(changes)}"
        )


def check_source_run(setup: Setup, inputs: Mapping[str, str]) -> None:
    """Raises if the state of ``training.continue_from`` does not fit a new run.

    Args:
      setup: setup of the new run.
      inputs: fingerprint of the new run.

    Raises:
      JaxtuneError: the model or a seed differs; the message lists the differences.
    """
    config = setup.config
    if not config.training.continue_from:
        return
    source = source_run(config)
    where = f"training.continue_from={source.run.path}"
    record = read_record(source.run.fingerprint)
    if record is None:
        raise JaxtuneError(f"{where}: that run has no record ({source.run.fingerprint.name})")
    # The base is compared file by file, unless the record is of an earlier version.
    for name in ("model", "tokenizer") if record.base is None else ("tokenizer",):
        if record.inputs.get(name) != inputs[name]:
            raise JaxtuneError(
                f"{where}: the {name} of that run differs ({source.config.model.path} there, "
                f"{config.model.path} here)"
            )
    seeds = source.config.training.seed, config.training.seed
    if seeds[0] != seeds[1] and not _same_constants(setup, *seeds):
        raise JaxtuneError(
            f"{where}: training.seed must be as in that run, because arrays of adapter.method="
            f"{setup.method.name} depend on it: {seeds[0]} → {seeds[1]}"
        )
    logger.info("continuing from %s after step %d", source.run.path, source.step)


def check_seed(setup: Setup, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises if a run is resumed with a seed that changes arrays which are not in its checkpoints.

    Args:
      setup: setup of the run.
      changes: changes of the config since the run was last started.
    """
    seeds = changes.get("training.seed")
    if seeds and not _same_constants(setup, *seeds):
        raise JaxtuneError(
            f"training.seed: {seeds[0]} → {seeds[1]}: arrays of adapter.method={setup.method.name} "
            "depend on it, so the run cannot be resumed with another one"
        )


def _same_constants(setup: Setup, *seeds: int) -> bool:
    drawn = [jax.tree.leaves(setup.method.init(setup.definition, seed)[1]) for seed in seeds]
    return all(map(np.array_equal, *drawn))


def continued_chat(config: Config, base: Chat, source: TensorSource) -> Chat:
    """Returns a chat format with the template of the run in ``training.continue_from``, if any.

    Args:
      config: config of the new run.
      base: chat format of the model that the run would start from otherwise.
      source: checkpoint of ``model.path``.
    """
    if not config.training.continue_from:
        return base
    previous = source_run(config)
    tokenizer = load_run_chat(previous.run, previous.config, source).tokenizer
    return base if tokenizer is None else base.with_template(tokenizer.chat_template)


def continued_state(setup: Setup) -> Callable[[TrainState], TrainState] | None:
    """Returns a function that changes the initial state of a new run into that of a checkpoint.

    Weights, moments and the running means of the check for bad steps are those of the checkpoint in
    ``training.continue_from``; None if it is empty. Steps and the learning-rate schedule start
    at 0. The function donates its argument.
    """
    if not setup.config.training.continue_from:
        return None
    return lambda initial: _restore(setup, source_run(setup.config), initial)


def _restore(setup: Setup, source: SourceRun, initial: TrainState) -> TrainState:
    abstract = setup.definition.abstract("trainable")
    optimizer = make_optimizer(source.config.optimizer, abstract, setup.schedule)
    like = state_like(setup.definition, optimizer, setup.mesh)
    replaced = [
        initial.trainable,
        *(
            node
            for node in jax.tree.leaves(initial.opt_state, is_leaf=_counts_schedule)
            if not _counts_schedule(node)
        ),
    ]
    for leaf in jax.tree.leaves(replaced):
        leaf.delete()  # a restore next to them would need the memory of two states
    with Checkpoints(source.run.checkpoints, source.config.checkpoint.keep) as checkpoints:
        stored, _ = checkpoints.restore(source.step, like)
    # Clipping and group rates change the structure of the state, but not its arrays.
    moments = jax.tree.unflatten(
        jax.tree.structure(initial.opt_state), jax.tree.leaves(stored.opt_state)
    )
    opt_state = jax.tree.map(
        lambda new, old: new if _counts_schedule(new) else old,
        initial.opt_state,
        moments,
        is_leaf=_counts_schedule,
    )
    # The loss scale belongs to the dtype.
    same = source.config.training.dtype == setup.config.training.dtype
    guard = stored.guard if same else initial.guard
    return TrainState(initial.step, stored.trainable, opt_state, guard)


def _counts_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)
