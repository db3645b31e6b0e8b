"""Checks the tree of a config file, applies overrides and freezes it as a `Config`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxtune.config.effect import text, unused_options
from jaxtune.config.length import TrainingDict, check_length, divisors_of, replace_length
from jaxtune.config.option import OptionValue
from jaxtune.config.tree import OPTIONS, SECTIONS, Config, ConfigLike, Derived, find_option
from jaxtune.errors import JaxtuneError, closest, shown
from jaxtune.strict_json import read_object

_log = logging.getLogger(__name__)


def default() -> ml_collections.ConfigDict:
    """Returns the tree of defaults, locked, so that setting an unknown key raises."""
    config = ml_collections.ConfigDict(Config().to_dict(), type_safe=False)
    config.training = TrainingDict(Config().to_dict()["training"], type_safe=False)
    config.lock()
    return config


def resolve(config: ConfigLike, overrides: Sequence[str] = ()) -> Config:
    """Checks a whole config, applies overrides and freezes it.

    Options that take no effect with the chosen method, weight format, optimizer or schedule are
    listed in one warning.

    Args:
      config: tree of sections; absent keys have their defaults.
      overrides: strings ``"section.name=value"``, applied in order. A length of the run
        (``training.steps``, ``epochs`` or ``tokens``) replaces that of the config.

    Returns:
      The checked config, with the requested values of options that were derived from devices.

    Raises:
      JaxtuneError: an unknown key (the message names the closest one), an invalid value, or an
        override that takes no effect.
    """
    values = _read(config)
    overridden: dict[str, None] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise JaxtuneError(f"--config.{key} needs a value: --config.{key}=…")
        option = find_option(key)
        values[key] = option.check(key, option.parse(key, value))
        overridden[key] = None
    resolved = Config().replace_flat(values)
    training = replace_length(resolved.training, list(overridden))
    check_length(training)
    _check_accumulation(training.batch_size, training.accumulation)
    if training.continue_from and resolved.adapter.init_from:
        raise JaxtuneError(
            "training.continue_from and adapter.init_from both give the initial weights; set one"
        )
    _check_effect(values, list(overridden), warn=not isinstance(config, Config))
    given = config.overridden if isinstance(config, Config) else frozenset()
    return dataclasses.replace(resolved, training=training, overridden=given | overridden.keys())


def from_json(path: str | Path) -> Config:
    """Reads ``config.json`` of a run; the original config file is not needed.

    Options that the file lacks, because an older version wrote it, have their defaults.

    Raises:
      JaxtuneError: the file is not JSON, an unknown key, an invalid value, or the config of a
        model; the message names the file.
    """
    return from_content(read_object(path), path)


def from_content(content: Mapping[str, Any], path: str | Path) -> Config:
    """Returns the config in the content of a ``config.json``; see `from_json`.

    Args:
      content: the parsed file.
      path: path of the file, for errors.
    """
    tree = dict(content)
    if "model_type" in tree:
        raise JaxtuneError(f"{path}: the config of a model, not of a run")
    try:
        derived = tree.pop("derived", None)
        config = Config().replace_flat(_read(tree))
        return config if derived is None else dataclasses.replace(config, derived=_derived(derived))
    except JaxtuneError as error:
        raise JaxtuneError(
            f"{path}: {error} (edited, or written by another version of jaxtune)"
        ) from error


def _check_accumulation(rows: int, count: int) -> None:
    """Raises if a number of micro-batches, unless it is 0, does not divide the rows of a batch."""
    if count and rows % count:
        divisors = divisors_of(rows)
        nearest = [max(n for n in divisors if n < count), *(n for n in divisors if n > count)][:2]
        raise JaxtuneError(
            f"training.batch_size={rows} does not divide into training.accumulation={count} "
            f"micro-batches; the nearest numbers that divide it: {', '.join(map(str, nearest))}"
        )


def _derived(content: Any) -> Derived:
    """Returns the entry ``derived`` of a ``config.json``, after checking it."""
    fields = {"devices": int, "kind": str, "requested": dict}
    if (
        not isinstance(content, dict)
        or content.keys() != fields.keys()
        or not all(isinstance(content[name], kind) for name, kind in fields.items())
    ):
        raise JaxtuneError(f'"derived" has devices, kind and requested, not {shown(content)}')
    requested = {
        key: find_option(key).check(key, value) for key, value in content["requested"].items()
    }
    return Derived(content["devices"], content["kind"], requested)


def _read(config: ConfigLike) -> dict[str, OptionValue]:
    """Returns all options of a tree by ``section.name``, after checking them."""
    if isinstance(config, Config):
        return config.requested().flat()
    if not isinstance(config, (Mapping, ml_collections.ConfigDict)):
        raise JaxtuneError(f"a config is a tree of sections, not {shown(config)}")
    values = Config().flat()
    for section, entries in dict(config).items():
        if section not in SECTIONS:
            raise JaxtuneError(
                f'unknown config section "{section}"{closest(str(section), SECTIONS)}'
            )
        if not isinstance(entries, (Mapping, ml_collections.ConfigDict)):
            raise JaxtuneError(
                f'config section "{section}" has named options, not {shown(entries)}'
            )
        for name, value in dict(entries).items():
            key = f"{section}.{name}"
            values[key] = find_option(key).check(key, value)
    return values


def _check_effect(
    values: Mapping[str, OptionValue], overridden: Sequence[str], *, warn: bool
) -> None:
    """Raises for an override without effect; with `warn`, warns of other such options."""
    without: dict[str, list[str]] = {}
    for unused in unused_options(values):
        value = values[unused.key]
        if unused.key in overridden:
            raise JaxtuneError(unused.error(value))
        if value != OPTIONS[unused.key].default:
            choice = f"{unused.selector}={unused.choice}"
            without.setdefault(choice, []).append(f"{unused.key}={text(value)}")
    if warn and without:
        groups = (f"{', '.join(options)} (with {choice})" for choice, options in without.items())
        _log.warning("config values without effect: %s", "; ".join(groups))
