"""``adapter.init_from``: settings taken from the initial adapter, and options that it overrides."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.config import AdapterConfig

_log = logging.getLogger(__name__)

# Options whose values come from the adapter, and their names in adapter_config.json.
_SETTINGS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rslora": "use_rslora",
    "targets": "target_modules",
    "feedforward": "feedforward_modules",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
    "new_tokens": "trainable_token_indices",
    "virtual_tokens": "num_virtual_tokens",
    "prefix_projection": "prefix_projection",
    "encoder_reparameterization_type": "encoder_reparameterization_type",
    "encoder_hidden_size": "encoder_hidden_size",
    "encoder_num_layers": "encoder_num_layers",
    "reduction_factor": "reduction_factor",
    "activation": "non_linearity",
    "scaling": "scaling",
}
# Options that the config decides, even if the adapter has a value.
_FROM_CONFIG = ("method", "dropout", "init_from")


def init_from(method: Method, stored: StoredAdapter, section: AdapterConfig) -> Method:
    """Returns the method of an initial adapter with the config's dropout.

    Logs the adapter's settings, and a warning for options of the config that have no effect.

    Args:
      method: the method that trained the adapter.
      stored: the adapter.
      section: the ``adapter`` section of the config.
    """
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    if "dropout" in fields and method.dropout != section.dropout:
        _log.info("adapter.dropout=%g replaces the adapter's %g", section.dropout, method.dropout)
        method = dataclasses.replace(method, dropout=section.dropout)  # type: ignore[type-var]
    _log.info("starting from %s: %s", section.init_from, _settings_text(stored.config))
    ignored = [
        f"adapter.{field.name}={_text(value)}"
        for field in dataclasses.fields(section)
        if (value := getattr(section, field.name)) != field.default
        and field.name not in _FROM_CONFIG
    ]
    if ignored:
        _log.warning(
            "without effect, because the adapter in adapter.init_from has its own settings: %s",
            ", ".join(ignored),
        )
    return method


def _settings_text(config: Mapping[str, Any]) -> str:
    nested = config.get("config")  # AdapterHub's format nests the settings
    values = nested if isinstance(nested, Mapping) else config
    found = {key: values[key] for key in _SETTINGS.values() if values.get(key)}
    return ", ".join(f"{key}={_text(value)}" for key, value in found.items())


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
