"""LoRA adapters in the form that vLLM loads: one rank, one scale, all projections of all experts.

vLLM reads a single ``r`` and ``lora_alpha``, and neither ``rank_pattern`` nor ``alpha_pattern``.
Factors are therefore padded with zeros to one rank, and scales are multiplied into B, which leaves
the edits unchanged.

Source: vLLM, vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py.
"""

from __future__ import annotations

import numpy as np

from jaxtune.adapter_files.pairs import Pair, kind_of, pairs_of, plain_config
from jaxtune.adapter_files.routed_experts import EXPERT, PROJECTIONS, experts_of
from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.factors import read_settings
from jaxtune.adapters.projections.modules_to_save import whole_weights
from jaxtune.adapters.projections.peft_files import PREFIX, target_modules
from jaxtune.adapters.targets import ROUTER
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import Definition

# Values that vLLM allows for max_lora_rank.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# A projection of latent attention that vLLM absorbs into other weights before it loads adapters.
_ABSORBED = "kv_b_proj"
_MERGE = "write the whole model with --format merged"
# Methods that cannot be merged into weights.
_VIRTUAL = ("PREFIX_TUNING", "LATENT_PREFIX", "PROMPT_TUNING", "P_TUNING", "AdapterHub's")


def for_vllm(stored: StoredAdapter, definition: Definition) -> StoredAdapter:
    """Returns a LoRA adapter with the same edits in a form that vLLM loads.

    Args:
      stored: an adapter in PEFT's format.
      definition: definition of the base model.

    Raises:
      JaxtuneError: vLLM rejects the adapter or would ignore part of it; the message names an
        alternative.
    """
    rank = check_vllm(stored)
    pairs = _with_all_experts(pairs_of(stored), definition)
    tensors: dict[str, np.ndarray] = {}
    for module, pair in pairs.items():
        more = rank - len(pair.lora_A)
        scaled = np.float32(pair.scale) * pair.lora_B
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.pad(pair.lora_A, ((0, more), (0, 0)))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.pad(scaled, ((0, 0), (0, more)))
    base = stored.config.get("base_model_name_or_path")
    config = plain_config(base, target_modules(definition, pairs))
    return StoredAdapter(config | {"r": rank, "lora_alpha": rank}, tensors)


def check_vllm(stored: StoredAdapter) -> int:
    """Checks that vLLM can load an adapter; the values of its tensors are not read.

    Returns:
      The rank to which all factors are padded.

    Raises:
      JaxtuneError: vLLM rejects the adapter or would ignore part of it; the message names an
        alternative.
    """
    _refuse(stored)
    largest = max(factor.rank for _, factor in read_settings(stored)["factors"])
    rank = next((rank for rank in RANKS if rank >= largest), None)
    if rank is None:
        raise JaxtuneError(f"vLLM takes ranks up to {RANKS[-1]}, not {largest}: {_MERGE}")
    return rank


def _refuse(stored: StoredAdapter) -> None:
    config, kind = stored.config, kind_of(stored)
    if kind in _VIRTUAL:
        raise JaxtuneError(
            f"vLLM loads LoRA adapters only, and this one is {kind}, which cannot be merged "
            "either: use it with --format peft"
        )
    if kind != "LoRA":
        raise JaxtuneError(f"vLLM loads LoRA adapters only, and this one is {kind}: {_MERGE}")
    whole = whole_weights(stored)
    if whole:
        raise JaxtuneError(f"vLLM does not support {whole[0]}, here {whole[1]!r}: {_MERGE}")
    if config.get("bias", "none") != "none":
        bias = config["bias"]
        raise JaxtuneError(f'vLLM does not support trained biases, here bias="{bias}": {_MERGE}')
    for key in stored.tensors:
        if f"{ROUTER}." in key:
            router = ROUTER.removeprefix(".")
            raise JaxtuneError(f"vLLM does not edit routers, here {router}: {_MERGE}")
        if f".{_ABSORBED}." in key:
            raise JaxtuneError(
                f"vLLM absorbs {_ABSORBED} into other weights before it loads an adapter, so the "
                f"edit of it would be ignored: {_MERGE}, or leave it out of adapter.targets"
            )


def _with_all_experts(pairs: dict[str, Pair], definition: Definition) -> dict[str, Pair]:
    """Adds zero edits for unedited experts: vLLM stacks all projections of a layer's experts."""
    edited = {match[1] for name in pairs if (match := EXPERT.fullmatch(name))}
    zero: dict[str, Pair] = {}
    for layer, experts in experts_of(definition).items():
        if layer not in edited:
            continue
        for projection in PROJECTIONS:
            out_features, in_features = experts.shapes[projection]
            nothing = Pair(
                np.zeros((1, in_features), np.float32), np.zeros((out_features, 1), np.float32), 1.0
            )
            zero |= {f"{layer}.{e}.{projection}": nothing for e in range(experts.count)}
    return zero | pairs
