"""LoRA adapters as vLLM loads them: one rank, one scale, and every projection of every expert.

vLLM reads one ``r`` and one ``lora_alpha`` and neither ``rank_pattern`` nor ``alpha_pattern``. So
factors are padded with zeros to one rank, and their scales are multiplied into B: the edits stay
what they were.

Source: vLLM, vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py.
"""

from __future__ import annotations

import numpy as np

from jaxtune.adapter_files.pairs import Pair, kind_of, pairs_of, plain_config
from jaxtune.adapter_files.routed_experts import EXPERT, PROJECTIONS, experts_of
from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.modules_to_save import whole_weights
from jaxtune.adapters.projections.peft_files import PREFIX, target_modules
from jaxtune.adapters.targets import ROUTER
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import Definition

# What max_lora_rank may be.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# Of latent attention. vLLM multiplies it into other weights once, before any adapter is there.
_ABSORBED = "kv_b_proj"
_MERGE = "write the whole model with --format merged"
# Methods of virtual tokens: no weight could take them in.
_VIRTUAL = ("PREFIX_TUNING", "LATENT_PREFIX", "PROMPT_TUNING", "P_TUNING", "AdapterHub's")


def for_vllm(stored: StoredAdapter, definition: Definition) -> StoredAdapter:
    """Returns a LoRA adapter with the same edits in a form that vLLM loads.

    Args:
      stored: in PEFT's format.
      definition: of the base model.

    Raises:
      JaxtuneError: something that vLLM refuses, or would leave out; the message names what is left.
    """
    _refuse(stored)
    pairs = _with_all_experts(pairs_of(stored), definition)
    largest = max(len(pair.lora_A) for pair in pairs.values())
    rank = next((rank for rank in RANKS if rank >= largest), None)
    if rank is None:
        raise JaxtuneError(f"vLLM takes ranks up to {RANKS[-1]}, not {largest}: {_MERGE}")
    tensors: dict[str, np.ndarray] = {}
    for module, pair in pairs.items():
        more = rank - len(pair.lora_A)
        scaled = np.float32(pair.scale) * pair.lora_B
        tensors[f"{PREFIX}{module}.lora_A.weight"] = np.pad(pair.lora_A, ((0, more), (0, 0)))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.pad(scaled, ((0, 0), (0, more)))
    base = stored.config.get("base_model_name_or_path")
    config = plain_config(base, target_modules(definition, pairs))
    return StoredAdapter(config | {"r": rank, "lora_alpha": rank}, tensors)


def _refuse(stored: StoredAdapter) -> None:
    config, kind = stored.config, kind_of(stored)
    if kind in _VIRTUAL:
        raise JaxtuneError(
            f"vLLM loads LoRA adapters alone, and this one is {kind}, which cannot be merged "
            "either: use it with --format peft"
        )
    if kind != "LoRA":
        raise JaxtuneError(f"vLLM loads LoRA adapters alone, and this one is {kind}: {_MERGE}")
    whole = whole_weights(stored)
    if whole:
        raise JaxtuneError(f"vLLM refuses {whole[0]}, here {whole[1]!r}: {_MERGE}")
    if config.get("bias", "none") != "none":
        raise JaxtuneError(f'vLLM refuses trained biases, here bias="{config["bias"]}": {_MERGE}')
    for key in stored.tensors:
        if f"{ROUTER}." in key:
            raise JaxtuneError(f"vLLM edits no routers, here {ROUTER.removeprefix('.')}: {_MERGE}")
        if f".{_ABSORBED}." in key:
            raise JaxtuneError(
                f"vLLM multiplies {_ABSORBED} into other weights before it loads an adapter, whose "
                f"edit of it would be left out: {_MERGE}, or leave it out of adapter.targets"
            )


def _with_all_experts(pairs: dict[str, Pair], definition: Definition) -> dict[str, Pair]:
    """Adds edits that are zero, for vLLM stacks all projections of all experts of a layer."""
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
