"""Checks that adapter_config.json and the adapter's tensors agree on edited modules and ranks.

jaxtune derives the edited modules from the tensors. PEFT derives them from the settings and skips
tensors of all other modules without an error, so the two must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.adapters.targets import find_pattern, layer_of
from jaxtune.errors import JaxtuneError

_EDIT = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<kind>lora_A\.weight|ia3_l|vera_lambda_[bd])", re.DOTALL
)
# Tensors whose first dimension is the rank, by method.
_OF_RANK = {"LORA": "lora_A.weight", "VERA": "vera_lambda_d"}


def check_agreement(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Checks that an adapter's settings include every module that its tensors edit.

    Args:
      config: the content of adapter_config.json.
      tensors: the adapter's tensors by PEFT's keys; only their shapes are read.

    Raises:
      JaxtuneError: settings and tensors disagree, or a setting has a value of the wrong type; the
        message names the setting.
    """
    parameters = config.get("target_parameters")
    if parameters is not None and not _names(parameters):
        raise _wrong_type("target_parameters", parameters, "a list of names")
    for key, value in tensors.items():
        match = _EDIT.fullmatch(key)
        if match is None:
            continue
        module = match["module"]
        try:
            setting = _leaves_out(config, module)
            rank = _rank(config, module) if match["kind"] in _OF_RANK.values() else None
        except re.error as error:
            raise JaxtuneError(
                f"adapter_config.json has an invalid regular expression: {error}"
            ) from None
        if setting is not None:
            raise JaxtuneError(
                f'adapter_config.json: "{setting}"={config[setting]!r} leaves {module} out, but '
                f'the file has tensors for it, such as "{key}": one of the two is out of date'
            )
        if rank is not None and value.ndim and (len(value) != rank or rank < 1):
            raise JaxtuneError(
                f'adapter_config.json gives {module} the rank {rank} ("r", "rank_pattern"), but '
                f'"{key}" has {len(value)}: one of the two is out of date'
            )


def _leaves_out(config: Mapping[str, Any], module: str) -> str | None:
    """Returns the setting that makes PEFT skip a module; None if PEFT edits it."""
    excluded, chosen = config.get("exclude_modules"), config.get("target_modules")
    if excluded and _selector("exclude_modules", excluded)(module):
        return "exclude_modules"
    if config.get("target_parameters"):
        return None  # edits of parameters are stored under the names of their modules
    if chosen and chosen != "all-linear" and not _selector("target_modules", chosen)(module):
        return "target_modules"
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return None
    layers = layers if isinstance(layers, list) else [layers]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in layers):
        raise _wrong_type("layers_to_transform", config["layers_to_transform"], "a list of layers")
    layer = layer_of(module)
    # In names of experts PEFT mistakes the expert's number for the layer's.
    if layer is None or ".experts." in module or layer in layers:
        return None
    return "layers_to_transform"


def _selector(key: str, value: Any) -> Callable[[str], bool]:
    """Returns a function that tells whether a setting selects a module, by PEFT's rules."""
    if isinstance(value, str):
        return lambda module: re.fullmatch(value, module) is not None
    if not _names(value):
        raise _wrong_type(key, value, "a list of names")
    return lambda module: any(f".{module}".endswith(f".{name}") for name in value)


def _rank(config: Mapping[str, Any], module: str) -> Any:
    """Returns the rank that the settings give a module; None if they give none."""
    if config.get("peft_type") not in _OF_RANK or config.get("target_parameters"):
        return None
    patterns = config.get("rank_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise _wrong_type("rank_pattern", patterns, "an object")
    pattern = find_pattern(patterns, module)
    key, rank = ("r", config.get("r")) if pattern is None else ("rank_pattern", patterns[pattern])
    if "r" in config and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise _wrong_type(key, rank, "a rank")
    return rank


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _wrong_type(key: str, value: Any, wanted: str) -> JaxtuneError:
    return JaxtuneError(f'adapter_config.json: "{key}"={value!r} is not {wanted}')
