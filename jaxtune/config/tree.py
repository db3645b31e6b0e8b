"""The config of a run: a frozen tree of typed sections."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import ml_collections

from jaxtune.config.adapter import AdapterConfig
from jaxtune.config.data import DataConfig
from jaxtune.config.model import MeshConfig, ModelConfig, QuantizeConfig
from jaxtune.config.option import Option, OptionValue, Section, options_of
from jaxtune.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainingConfig,
)
from jaxtune.errors import JaxtuneError, closest


@dataclasses.dataclass(frozen=True)
class Derived:
    """What a config was fitted to, and the values that were requested instead.

    Attributes:
      devices: number of devices.
      kind: type of the devices, as JAX names it.
      requested: requested values of the derived options by ``section.name``.
    """

    devices: int
    kind: str
    requested: Mapping[str, OptionValue]


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a run. Each section documents its options.

    Attributes:
      overridden: options set on the command line, as ``section.name``.
      derived: options whose values are derived from the devices; None before that.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    quantize: QuantizeConfig = dataclasses.field(default_factory=QuantizeConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    overridden: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)
    derived: Derived | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Mapping[str, OptionValue]]:
        """Returns the options as ``{section: {name: value}}``."""
        return {name: getattr(self, name).to_dict() for name in SECTIONS}

    def flat(self) -> dict[str, OptionValue]:
        """Returns the options as ``{"section.name": value}``."""
        return {
            f"{section}.{name}": value
            for section, options in self.to_dict().items()
            for name, value in options.items()
        }

    def replace(self, **sections: Mapping[str, OptionValue]) -> Config:
        """Returns a copy with changed options, ``config.replace(mesh={"data": 1})``.

        Derived options keep their values; if one is changed, the others return to what was
        requested, and `derived` is None.

        Raises:
          JaxtuneError: an unknown section or option, or an invalid value.
        """
        keys = {f"{name}.{option}" for name, options in sections.items() for option in options}
        if self.derived is not None and keys & self.derived.requested.keys():
            return self.requested().replace(**sections)
        changed: dict[str, Any] = {}
        for section, options in sections.items():
            if section not in SECTIONS:
                raise JaxtuneError(
                    f'unknown config section "{section}"{closest(section, SECTIONS)}'
                )
            keys = {name: f"{section}.{name}" for name in options}
            checked = {
                name: find_option(key).check(key, options[name]) for name, key in keys.items()
            }
            changed[section] = dataclasses.replace(getattr(self, section), **checked)
        return dataclasses.replace(self, **changed)

    def replace_flat(self, options: Mapping[str, OptionValue]) -> Config:
        """Returns a copy with changed options by ``section.name``; see `replace`."""
        sections: dict[str, dict[str, OptionValue]] = {}
        for key, value in options.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        return self.replace(**sections)

    def requested(self) -> Config:
        """Returns the config with the requested values of derived options."""
        if self.derived is None:
            return self
        return dataclasses.replace(self, derived=None).replace_flat(self.derived.requested)

    def with_derived(
        self, devices: int, kind: str, **sections: Mapping[str, OptionValue]
    ) -> Config:
        """Returns a copy with values that were derived from devices.

        Args:
          devices: number of devices.
          kind: type of the devices.
          **sections: derived values by section and name.
        """
        before = self.requested().flat()
        fitted = dataclasses.replace(self, derived=None).replace(**sections)
        changed = {key for key, value in fitted.flat().items() if value != before[key]}
        requested = {key: value for key, value in before.items() if key in changed}
        return dataclasses.replace(fitted, derived=Derived(devices, kind, requested))

    def to_json(self) -> str:
        """Returns the content of a run's ``config.json``: the sections and ``derived``."""
        content: dict[str, Any] = dict(self.to_dict())
        if self.derived is not None:
            content["derived"] = dataclasses.asdict(self.derived)
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


ConfigLike: TypeAlias = Config | ml_collections.ConfigDict | Mapping[str, Any]
"""An argument of `jaxtune.config.resolve`: a resolved config, or a tree of sections."""

SECTIONS: dict[str, Section] = {
    field.name: value
    for field in dataclasses.fields(Config)
    if isinstance(value := getattr(Config(), field.name), Section)
}
"""Sections with default values, by name."""

OPTIONS: dict[str, Option] = {
    f"{section}.{name}": option
    for section, defaults in SECTIONS.items()
    for name, option in options_of(defaults).items()
}
"""All options by ``section.name``."""


def find_option(key: str) -> Option:
    """Returns the option with a name ``section.name``.

    Raises:
      JaxtuneError: an unknown key; the message names the closest one.
    """
    if key not in OPTIONS:
        raise JaxtuneError(f'unknown config key "{key}"{closest(key, OPTIONS)}')
    return OPTIONS[key]
