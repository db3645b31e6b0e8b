"""Changes of a run's config when it is resumed: which are allowed, and their history."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import OPTIONS, Config, TrainingConfig
from jaxtune.config.length import LENGTHS, length_unit
from jaxtune.data.sources import weights_of
from jaxtune.data.splits import parse_eval_sets
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import entry, expect, read_objects

Changes = Mapping[str, tuple[Any, Any]]
"""Changed options by ``section.name``, as (old, new)."""

_FREE_SECTIONS = ("logging", "checkpoint", "evaluation", "profile", "mesh")
FREE = frozenset(
    [
        *(key for key in OPTIONS if key.partition(".")[0] in _FREE_SECTIONS),
        *("training.accumulation", "training.watchdog_minutes", "training.max_bad_steps"),
        "data.cache",
    ]
)
"""Options that do not change what is learned, so they may differ when a run is resumed."""

LOCATIONS = frozenset(
    [
        *("model.path", "model.revision", "data.train", "data.eval", "data.revision"),
        *("data.prompt_templates", "adapter.init_from", "adapter.expert_scores"),
    ]
)
"""Options that say where an input is. They may differ if its content is that of the record."""

_LENGTHS = frozenset(f"training.{name}" for name in LENGTHS)


def find_changes(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Returns the options that differ as requested, whatever was derived from the devices."""
    before, after = old.requested().flat(), new.requested().flat()
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def needs_acceptance(key: str, old: Any, new: Any) -> bool:
    """Returns whether a change of an option passes only if it is accepted."""
    if key in LOCATIONS:  # the names and weights of data sets are more than a location
        if key == "data.train":
            return weights_of(old) != weights_of(new)
        if key == "adapter.init_from":
            return bool(old) != bool(new)
        return key == "data.eval" and [*parse_eval_sets(old)] != [*parse_eval_sets(new)]
    return key not in FREE | _LENGTHS


def resumed_config(run: Path, frozen: Config, given: Config) -> Config:
    """Returns the config with which a run is resumed; changes have been checked.

    Values that were derived from the devices are kept, unless an option in question has changed or
    is set on the command line to another value than the derived one.

    Args:
      run: directory of the run, for messages.
      frozen: config of the run.
      given: config to resume it with.

    Raises:
      JaxtuneError: the length is in another unit than that of the run.
    """
    changes = find_changes(frozen, given)
    unit, given_unit = length_unit(frozen.training), length_unit(given.training)
    if unit != given_unit:
        new, old = getattr(given.training, given_unit), getattr(frozen.training, unit)
        raise JaxtuneError(
            f"{run}: training.{given_unit}={new}: the length of this run is in {unit} "
            f"(training.{unit}={old}); change training.{unit}"
        )
    used, asked = frozen.flat(), given.requested().flat()
    overridden = {key for key in given.overridden if used[key] != asked[key]}
    placed = any(
        key.startswith("mesh.") or key == "training.accumulation"
        for key in changes.keys() | overridden
    )
    base = frozen.requested() if placed else frozen
    resumed = base.replace_flat({key: new for key, (_, new) in changes.items()})
    return dataclasses.replace(resumed, overridden=given.overridden)


def describe(changes: Changes) -> str:
    """Returns ``"key: old → new, …"``, sorted by key."""
    return ", ".join(f"{key}: {old} → {new}" for key, (old, new) in sorted(changes.items()))


def first_training(history: list[dict[str, Any]], config: Config) -> TrainingConfig:
    """Returns the ``training`` section of a run with the length with which it began.

    Args:
      history: result of `read_history`.
      config: config of the run.
    """
    unit = length_unit(config.training)
    for line in history:
        if pair := line["changes"].get(f"training.{unit}"):
            return config.replace(training={unit: pair[0]}).training
    return config.training


def read_history(path: Path) -> list[dict[str, Any]]:
    """Reads ``history.jsonl``: ``step`` and ``changes`` of each resume with changes.

    A line may have ``accepted``, the changes that `--accept-changes` named.

    Raises:
      JaxtuneError: a line is damaged; the message names file and line.
    """
    if not path.is_file():
        return []
    lines = []
    for _, place, line in read_objects(path):
        changes = entry(line, "changes", dict, place)
        for key, pair in changes.items():
            if len(expect(pair, list, f"{place}: {key}")) != 2:
                raise JaxtuneError(f"{place}: {key}: not an old and a new value")
        lines.append({"step": entry(line, "step", int, place), "changes": changes})
        if "accepted" in line:
            keys = entry(line, "accepted", list, place)
            lines[-1]["accepted"] = [expect(key, str, f"{place}: accepted") for key in keys]
    return lines
