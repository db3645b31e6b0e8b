"""What an adapter to start from brings, and what of a config it leaves without effect."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.config import AdapterConfig

_log = logging.getLogger(__name__)

# What adapter_config.json calls the knobs that an adapter brings values for.
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
# Knobs of how training goes, which count whatever an adapter says.
_TRAINING = ("method", "dropout", "init_from")


def init_from(method: Method, stored: StoredAdapter, section: AdapterConfig) -> Method:
    """Returns the method of an adapter to start from as a config trains it, and logs what counts.

    Args:
      method: of the adapter.
      stored: the adapter.
      section: the ``adapter`` section of the config.
    """
    fields = {field.name for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    if "dropout" in fields and method.dropout != section.dropout:
        _log.info("adapter.dropout=%g replaces %g of the adapter", section.dropout, method.dropout)
        method = dataclasses.replace(method, dropout=section.dropout)  # type: ignore[type-var]
    _log.info("starting from %s: %s", section.init_from, _brought(stored.config))
    replaced = [
        f"adapter.{field.name}={_text(value)}"
        for field in dataclasses.fields(section)
        if (value := getattr(section, field.name)) != field.default and field.name not in _TRAINING
    ]
    if replaced:
        _log.warning(
            "without effect, for the adapter of adapter.init_from brings its own: %s",
            ", ".join(replaced),
        )
    return method


def _brought(config: Mapping[str, Any]) -> str:
    nested = config.get("config")
    values = nested if isinstance(nested, Mapping) else config
    brought = {key: values[key] for key in _SETTINGS.values() if values.get(key)}
    return ", ".join(f"{key}={_text(value)}" for key, value in brought.items())


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
