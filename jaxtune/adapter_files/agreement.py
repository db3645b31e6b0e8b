"""Checks that adapter_config.json and the adapter's tensors agree on edited modules and ranks.

jaxtune derives the edited modules from the tensors. PEFT derives them from the settings and skips
tensors of all other modules without an error, so the two must agree.

Source: `check_target_module_exists` in PEFT's tuners/tuners_utils.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxtune.adapters.targets import ROUTER, find_pattern, match_pattern
from jaxtune.errors import JaxtuneError, shown

_EDIT = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<kind>lora_A\.weight|ia3_l|vera_lambda_[bd])", re.DOTALL
)
# Tensors whose first dimension is the rank, and PEFT's default of the rank, by method.
_OF_RANK = {"LORA": ("lora_A.weight", 8), "VERA": ("vera_lambda_d", 256)}


def check_agreement(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Checks that an adapter's settings include every module that its tensors edit.

    Args:
      config: the content of adapter_config.json, whose values are valid (see `check_settings`).
      tensors: the adapter's tensors by PEFT's keys; only their shapes are read.

    Raises:
      JaxtuneError: settings and tensors disagree; the message names the setting.
    """
    _check_layers(config)
    for key, value in tensors.items():
        match = _EDIT.fullmatch(key)
        if match is None:
            continue
        module, shape = match["module"], value.shape
        if (setting := _leaves_out(config, module)) is not None:
            raise JaxtuneError(
                f'adapter_config.json: "{setting}"={shown(config.get(setting))} leaves {module} '
                f'out, but the file has tensors for it, such as "{key}": one of the two is out of '
                "date"
            )
        _check_rank(config, module, key, shape)
        if match["kind"] == "ia3_l" and len(shape) == 2:
            _check_end(config, module, key, shape)


def _check_layers(config: Mapping[str, Any]) -> None:
    """Raises for settings of layers that PEFT refuses."""
    layers, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if pattern and layers is None:
        raise JaxtuneError(
            'adapter_config.json: "layers_pattern" is given without "layers_to_transform"'
        )
    if config.get("peft_type") == "LORA" and isinstance(config.get("target_modules"), str):
        for key, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if value is not None:
                raise JaxtuneError(
                    f'adapter_config.json: "{key}" cannot be used where "target_modules" is a '
                    "pattern"
                )


def _leaves_out(config: Mapping[str, Any], module: str) -> str | None:
    """Returns the setting that makes PEFT skip a module; None if PEFT edits it."""
    if _selects(config, "exclude_modules", module):
        return "exclude_modules"
    if _is_parameter(config, module):
        return None
    chosen: Any = config.get("target_modules")
    if not _selects(config, "target_modules", module):
        return "target_modules"
    if isinstance(chosen, str) or module in chosen or _is_in_layers(config, module):
        return None
    return "layers_to_transform"


def _selects(config: Mapping[str, Any], key: str, module: str) -> bool:
    """Returns whether a setting, a list of names or a pattern, selects a module."""
    value = config.get(key) or []
    if not isinstance(value, str):
        return any(f".{module}".endswith(f".{name}") for name in value)
    if key == "target_modules" and value.lower() == "all-linear":
        return module != "lm_head" and not module.endswith(ROUTER)
    where = f'adapter_config.json: "{key}"'
    return match_pattern(value, module, where, whole=True) is not None


def _is_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Returns whether tensors of a module edit one of its parameters in ``target_parameters``."""
    # Edits of several parameters of a module are nested.
    inner = module.replace(".base_layer", "")
    owners = (name.rpartition(".")[0] for name in config.get("target_parameters") or [])
    return any(f".{inner}".endswith(f".{owner or 'experts'}") for owner in owners)


def _is_in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Returns whether a module is in one of ``layers_to_transform``, if there are any."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first number in the name is that of the layer; the second may be that of an expert.
    places = [rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\." for pattern in patterns]
    places = places or [r".*?\.[^.]*\.(?P<layer>\d+)\."]
    key = 'adapter_config.json: "layers_pattern"'
    found = next((m for place in places if (m := match_pattern(place, module, key))), None)
    layers = layers if isinstance(layers, list) else [layers]
    return found is not None and int(found["layer"]) in layers


def _check_rank(config: Mapping[str, Any], module: str, key: str, shape: tuple[int, ...]) -> None:
    """Raises if the first dimension of a tensor is not the rank that the settings give."""
    ending, default = _OF_RANK.get(str(config.get("peft_type")), ("", 0))
    if not ending or not key.endswith(ending) or not shape or _is_parameter(config, module):
        return
    patterns = config.get("rank_pattern") or {}
    pattern = find_pattern(patterns, module, 'adapter_config.json: "rank_pattern"')
    rank = config.get("r", default) if pattern is None else patterns[pattern]
    if shape[0] != rank:
        raise JaxtuneError(
            f'adapter_config.json gives {module} the rank {rank} ("r", "rank_pattern"), but '
            f'"{key}" has {shape[0]}: one of the two is out of date'
        )


def _check_end(config: Mapping[str, Any], module: str, key: str, shape: tuple[int, ...]) -> None:
    """Raises if PEFT would scale the other end of a module than the shape of a tensor says."""
    setting = config.get("feedforward_modules")
    if isinstance(setting, str):
        inputs = _selects(config, "feedforward_modules", module)
    else:
        inputs = any(module.endswith(name) for name in setting or [])  # also within a name
    if (shape[0] == 1) != inputs and shape != (1, 1):
        ends = ("inputs", "outputs") if inputs else ("outputs", "inputs")
        raise JaxtuneError(
            f'adapter_config.json: "feedforward_modules"={shown(setting)} scales the {ends[0]} of '
            f'{module}, but "{key}" of shape {list(shape)} scales its {ends[1]}'
        )
