"""The length of a run: ``training.steps``, ``training.epochs`` and ``training.tokens``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from jaxtune.config.training import TrainingConfig
from jaxtune.errors import JaxtuneError

_log = logging.getLogger(__name__)

LENGTHS = {name: getattr(TrainingConfig(), name) for name in ("steps", "epochs", "tokens")}
"""The three spellings of the length with their defaults."""


class TrainingDict(ml_collections.ConfigDict):
    """The ``training`` section of `default`: the length that is set last replaces the others."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Sets an option, as attributes do; a length resets the other two to their defaults."""
        super().__setitem__(name, value)
        for other, default in LENGTHS.items() if name in LENGTHS else ():
            if other != name and other in self:
                super().__setitem__(other, default)


def replace_length(training: dict[str, Any], overridden: Sequence[str]) -> None:
    """Lets a length from the command line replace the one of the config, in place.

    Args:
      training: the options of the section.
      overridden: the keys set on the command line.

    Raises:
      JaxtuneError: two lengths on the command line.
    """
    given = [name for name in LENGTHS if f"training.{name}" in overridden]
    if len(given) > 1:
        raise JaxtuneError(f"{_settings(training, given)}: a run has one length; set one of them")
    if not given or (given != ["steps"] and not training[given[0]]):
        return
    replaced = [n for n, default in LENGTHS.items() if n not in given and training[n] != default]
    if replaced:
        new, old = _settings(training, given), _settings(training, replaced)
        _log.info("%s replaces %s of the config", new, old)
    training |= {name: default for name, default in LENGTHS.items() if name not in given}


def check_length(training: Mapping[str, Any]) -> None:
    """Raises if two lengths differ from their defaults."""
    given = [name for name, default in LENGTHS.items() if training[name] != default]
    if len(given) > 1:
        raise JaxtuneError(f"{_settings(training, given)}: a run has one length; set one of them")


def _settings(training: Mapping[str, Any], names: Sequence[str]) -> str:
    return " and ".join(f"training.{name}={training[name]}" for name in names)
