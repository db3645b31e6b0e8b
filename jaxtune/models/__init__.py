"""Architectures, by the ``model_type`` of config.json. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.errors import lookup
from jaxtune.layers.decoder import CausalLM
from jaxtune.models import deepseek, deepseek_v2, deepseek_v3, llama, qwen2, qwen3
from jaxtune.models.hf_config import check_supported, read

ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], CausalLM]] = {
    "deepseek": deepseek.build,
    "deepseek_v2": deepseek_v2.build,
    "deepseek_v3": deepseek_v3.build,
    "llama": llama.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
}


def build_model(config: Mapping[str, Any]) -> CausalLM:
    """Builds the abstract model that a config.json describes.

    Raises:
      JaxtuneError: an unknown ``model_type``, or a setting that is not supported.
    """
    kind = read(config, "model_type", str)
    build = lookup(ARCHITECTURES, kind, "config.json: model_type")
    check_supported(config)
    return build(config)
