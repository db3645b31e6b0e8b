"""Fine-tuning methods.

A new method is one file, a line in `jaxtune.registry.METHODS` and, if PEFT has the method, a line
in `PEFT_TYPES`.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtune.adapters.esft import esft
from jaxtune.adapters.method import Method, StoredAdapter, is_adapterhub
from jaxtune.adapters.projections import bitfit, dora, ia3, lora, vera
from jaxtune.adapters.virtual import bottleneck, prefix, prompt, ptuning
from jaxtune.config import AdapterConfig
from jaxtune.errors import lookup
from jaxtune.registry import METHODS


def _lora_from_peft(stored: StoredAdapter) -> Method:
    return dora.from_peft(stored) if stored.config.get("use_dora") else lora.from_peft(stored)


PEFT_TYPES: dict[str, Callable[[StoredAdapter], Method]] = {
    "LORA": _lora_from_peft,
    "IA3": ia3.from_peft,
    "BITFIT": bitfit.from_peft,
    "VERA": vera.from_peft,
    esft.PEFT_TYPE: esft.from_peft,
    "PREFIX_TUNING": prefix.from_peft,
    prefix.LATENT: prefix.from_peft,
    "PROMPT_TUNING": prompt.from_peft,
    "P_TUNING": ptuning.from_peft,
}


def method_from_config(section: AdapterConfig) -> Method:
    """Returns the method that the ``adapter`` section of a config selects.

    Raises:
      JaxtuneError: an unknown method, or a setting that the method cannot use.
    """
    return lookup(METHODS, section.method, "adapter.method").load()(section)


def method_from_peft(stored: StoredAdapter) -> Method:
    """Returns the method and settings of an adapter in PEFT's or AdapterHub's format.

    Raises:
      JaxtuneError: an unknown ``peft_type``, or a setting that is not supported.
    """
    if is_adapterhub(stored.config):
        return bottleneck.from_adapterhub(stored)
    kind = str(stored.config.get("peft_type"))
    return lookup(PEFT_TYPES, kind, "adapter_config.json: peft_type")(stored)
