"""The config of a run: typed sections, checked and frozen.

The ``get_config()`` of a config file, a Python file, returns `default` with changes; the command
line overrides single keys (``--config.adapter.rank=8``). `resolve` checks the whole tree and
freezes it. A run directory stores the frozen tree.
"""

from jaxtune.config.adapter import AdapterConfig
from jaxtune.config.data import DataConfig
from jaxtune.config.files import load_file
from jaxtune.config.model import MeshConfig, ModelConfig, QuantizeConfig
from jaxtune.config.resolve import default, from_content, from_json, resolve
from jaxtune.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainingConfig,
)
from jaxtune.config.tree import OPTIONS, Config, ConfigLike

__all__ = [
    "OPTIONS",
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "ConfigLike",
    "DataConfig",
    "EvaluationConfig",
    "LoggingConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "QuantizeConfig",
    "TrainingConfig",
    "default",
    "from_content",
    "from_json",
    "load_file",
    "resolve",
]
