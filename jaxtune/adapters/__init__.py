"""Fine-tuning methods. A new one is one file and one line in each registry that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtune.adapters import full
from jaxtune.adapters.esft import esft
from jaxtune.adapters.full import Full
from jaxtune.adapters.method import Method, StoredAdapter, is_adapterhub
from jaxtune.adapters.projections import bitfit, dora, ia3, lora, pissa, vera
from jaxtune.adapters.projections.lora import Lora
from jaxtune.adapters.virtual import bottleneck, prefix, prompt, ptuning
from jaxtune.errors import JaxtuneError, lookup

METHODS: dict[str, Callable[[Any], Method]] = {
    "lora": lora.from_config,
    "dora": dora.from_config,
    "pissa": pissa.from_config,
    "ia3": ia3.from_config,
    "bitfit": bitfit.from_config,
    "vera": vera.from_config,
    "esft": esft.from_config,
    "full": full.from_config,
    "bottleneck": bottleneck.from_config,
    "prefix": prefix.from_config,
    "prompt": prompt.from_config,
    "ptuning": ptuning.from_config,
}


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


def method_from_config(section: Any) -> Method:
    """Returns the method that the ``adapter`` section of a config asks for.

    Raises:
      JaxtuneError: no such method, or tokens to train with one that does not train tokens.
    """
    method = lookup(METHODS, section.method, "adapter.method")(section)
    # Full fine-tuning trains the rows of all tokens.
    if (section.new_tokens or section.train_tokens) and not isinstance(method, (Lora, Full)):
        knob = "new_tokens" if section.new_tokens else "train_tokens"
        raise JaxtuneError(
            f"adapter.{knob} has no effect with adapter.method={section.method}: lora, dora and "
            "pissa train the rows of tokens"
        )
    return method


def method_from_peft(stored: StoredAdapter) -> Method:
    """Returns the method, with its settings, of an adapter in PEFT's format, or AdapterHub's."""
    if is_adapterhub(stored.config):
        return bottleneck.from_adapterhub(stored)
    kind = str(stored.config.get("peft_type"))
    return lookup(PEFT_TYPES, kind, "adapter_config.json: peft_type")(stored)
