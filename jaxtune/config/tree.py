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


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of a run. Each section documents its options."""

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
        """Returns a copy with changed options: ``config.replace(mesh={"data": 1})``; no checks."""
        changed = {
            name: dataclasses.replace(getattr(self, name), **options)
            for name, options in sections.items()
        }
        return dataclasses.replace(self, **changed)

    def to_json(self) -> str:
        """Returns the content of a run's ``config.json``."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


ConfigLike: TypeAlias = Config | ml_collections.ConfigDict | Mapping[str, Any]
"""An argument of `jaxtune.config.resolve`: a resolved config, or a tree of sections."""

SECTIONS: dict[str, Section] = {name: getattr(Config(), name) for name in Config.__annotations__}
"""Sections with default values, by name."""

OPTIONS: dict[str, Option] = {
    f"{section}.{name}": option
    for section, defaults in SECTIONS.items()
    for name, option in options_of(defaults).items()
}
"""All options by ``section.name``."""
