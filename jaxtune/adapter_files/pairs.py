"""LoRA adapters on disk as pairs of factors by module, the form for combining and exporting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.factors import Factor, read_settings
from jaxtune.adapters.projections.peft_files import PREFIX


class Pair(NamedTuple):
    """The factors of one module's edit, scale · B A.

    Attributes:
      lora_A: float32 [r, in].
      lora_B: float32 [out, r].
      scale: factor on B A.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    scale: float

    @property
    def edit(self) -> np.ndarray:
        """The edit scale · B A, which is added to the weight, float32 [out, in]."""
        return np.float32(self.scale) * (self.lora_B @ self.lora_A)


def kind_of(stored: StoredAdapter) -> str:
    """Returns the name of an adapter's method for messages: "LoRA", "DoRA", "IA3", …"""
    config = stored.config
    kind = str(config.get("peft_type", "AdapterHub's"))
    if kind != "LORA":
        return kind
    return "DoRA" if config.get("use_dora") else "LoRA"


def pairs_of(stored: StoredAdapter) -> dict[str, Pair]:
    """Returns the factors of a LoRA adapter on disk by Hugging Face module name.

    Raises:
      JaxtuneError: see `jaxtune.adapters.projections.factors.read_settings`.
    """
    settings: dict[str, Factor] = dict(read_settings(stored)["factors"])
    factors = {
        (module, which): stored.tensors[f"{PREFIX}{module}.{which}.weight"].astype(np.float32)
        for module in settings
        for which in ("lora_A", "lora_B")
    }
    return {
        module: Pair(factors[module, "lora_A"], factors[module, "lora_B"], factor.scale)
        for module, factor in settings.items()
    }


def plain_config(base: str | None, targets: Sequence[str]) -> dict[str, Any]:
    """Returns adapter_config.json of plain LoRA, without rank and alpha."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": list(targets),
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
