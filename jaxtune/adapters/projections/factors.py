"""The factors of LoRA, and reading them from PEFT's files."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections import biases, new_tokens
from jaxtune.adapters.projections.modules_to_save import saved_modules
from jaxtune.adapters.projections.peft_files import PREFIX, edit_tensors
from jaxtune.adapters.targets import find_pattern
from jaxtune.errors import JaxtuneError, shown

_KEY = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_magnitude_vector)")


@dataclasses.dataclass(frozen=True)
class Factor:
    """Rank and alpha of one projection of one layer.

    Attributes:
      rank: r, the number of rows of A.
      alpha: numerator of the scale.
      rslora: divides alpha by √rank instead of rank.
    """

    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor on B A: alpha / rank, or alpha / √rank for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# Values of init_lora_weights that leave the base unchanged. The others edit it, and the factors
# then belong to the edited base instead of the checkpoint.
_PLAIN_INITS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")


def read_settings(stored: StoredAdapter) -> dict[str, Any]:
    """Returns the arguments of `Lora` for a LoRA adapter written by PEFT.

    Raises:
      JaxtuneError: an unsupported setting or tensor.
    """
    config = stored.config
    start = str(config.get("init_lora_weights"))
    if start.lower() not in _PLAIN_INITS:
        raise JaxtuneError(
            f'adapter_config.json: "init_lora_weights"={shown(start)} means '
            "factors over an edited base; let PEFT convert the adapter to plain LoRA"
        )
    factors = _read_factors(stored)
    if not factors:
        raise JaxtuneError("adapter_model.safetensors holds no LoRA factors")
    dropout = _number("lora_dropout", config.get("lora_dropout") or 0.0)
    if not 0 <= dropout < 1:
        raise JaxtuneError(f'adapter_config.json: "lora_dropout"={dropout} is not between 0 and 1')
    return {
        "dropout": dropout,
        "factors": tuple(sorted(factors.items())),
        "modules_to_save": saved_modules(stored),
        "token_rows": new_tokens.on_disk(stored),
        "bias": biases.setting(config),
        "from_file": True,
    }


def _read_factors(stored: StoredAdapter) -> dict[str, Factor]:
    """Returns each module's rank and alpha.

    Raises:
      JaxtuneError: a tensor is not a factor, or a module lacks one of its factors.
    """
    config, factors = stored.config, {}
    needed = ["lora_A.weight", "lora_B.weight"]
    needed += ["lora_magnitude_vector"] if config.get("use_dora") else []
    others = new_tokens.without(stored._replace(tensors=biases.without(stored)))
    for key, value in edit_tensors(StoredAdapter(config, others), "a LoRA factor"):
        match = _KEY.fullmatch(key)
        dimensions = 2 if key.endswith(".weight") else 1
        if match is None or match[2] not in needed or value.ndim != dimensions:
            raise JaxtuneError(f'adapter_model.safetensors: "{key}" is not a LoRA factor')
        name, which = match[1], match[2]
        for other in needed:
            if f"{PREFIX}{name}.{other}" not in stored.tensors:
                lacks = other.removesuffix(".weight")
                raise JaxtuneError(f'adapter_model.safetensors: "{name}" lacks {lacks}')
        if which == "lora_A.weight":
            alpha = _pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
            factors[name] = Factor(value.shape[0], alpha, bool(config.get("use_rslora")))
    return factors


def _pattern(patterns: Any, name: str, default: Any) -> float:
    """Returns a module's alpha: that of the first pattern that matches the end of its path."""
    if not isinstance(patterns, Mapping):
        raise JaxtuneError(f'adapter_config.json: "alpha_pattern" is {patterns!r}, not an object')
    pattern = find_pattern(patterns, name, 'adapter_config.json: "alpha_pattern"')
    if pattern is None:
        return _number("lora_alpha", default)
    return _number("alpha_pattern", patterns[pattern])


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise JaxtuneError(f'adapter_config.json: "{key}" is {value!r}, not a number')
    return float(value)
