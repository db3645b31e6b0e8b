"""The settings of adapter_config.json that an adapter may have.

A setting that is neither read nor without effect on what the tensors mean must be unset. A setting
that a later version of PEFT adds is unknown here, and so it is refused by name where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.adapters.esft.esft import PEFT_TYPE as ESFT
from jaxtune.errors import JaxtuneError

# Read, or of no effect, whatever the method: where the adapter comes from and what it is for.
ALWAYS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ]
)
# The tensors of the file say which modules are edited.
TARGETS = frozenset(
    [
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
    ]
)
_LENGTH = 60


class KnownSettings(NamedTuple):
    """The settings of one kind of adapter.

    Attributes:
      read: settings that are read.
      inert: settings that do not change what the tensors mean: how training started, or details of
        something that is not in use.
    """

    read: frozenset[str]
    inert: frozenset[str] = frozenset()


def _settings(read: str, inert: str = "", common: frozenset[str] = TARGETS) -> KnownSettings:
    return KnownSettings(frozenset(read.split()) | common, frozenset(inert.split()))


_PROMPT = frozenset(
    [
        "num_attention_heads",
        "num_layers",
        "num_transformer_submodules",
        "num_virtual_tokens",
        "token_dim",
    ]
)
_PREFIX = _settings("encoder_hidden_size prefix_projection", "init_weights", _PROMPT)

KINDS: dict[str, KnownSettings] = {
    "LORA": _settings(
        "alpha_pattern bias init_lora_weights lora_alpha lora_dropout r rank_pattern "
        "target_parameters trainable_token_indices use_dora use_rslora",
        # With ensure_weight_tying the tensors of a tied head are in the file.
        "corda_config ensure_weight_tying eva_config loftq_config lora_ga_config megatron_core "
        "qalora_group_size",
    ),
    "IA3": _settings("feedforward_modules", "init_ia3_weights"),
    "BITFIT": _settings(""),
    "VERA": _settings(
        "r vera_dropout", "d_initial init_weights projection_prng_key save_projection"
    ),
    ESFT: _settings("experts non_expert_modules shared_experts"),
    "PREFIX_TUNING": _PREFIX,
    "LATENT_PREFIX": KnownSettings(
        _PREFIX.read | {"kv_lora_rank", "qk_rope_head_dim"}, _PREFIX.inert
    ),
    "PROMPT_TUNING": _settings(
        "",
        "prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path",
        _PROMPT,
    ),
    "P_TUNING": _settings(
        "encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type",
        "",
        _PROMPT,
    ),
}
# What a setting that is not in use has, where that is neither null nor false nor empty.
UNUSED: Mapping[str, Any] = {"bias": "none"}


def check_settings(config: Mapping[str, Any]) -> None:
    """Refuses an adapter with a setting that would be ignored although it changes the result.

    Args:
      config: the content of adapter_config.json; kinds that are not known here are left to who
        looks them up.

    Raises:
      JaxtuneError: such a setting; the message names it.
    """
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        return
    known = ALWAYS | KINDS[kind].read | KINDS[kind].inert
    for key, value in config.items():
        # A number 0 is equal to False.
        if key in known or value in (None, False, "", [], {}, UNUSED.get(key)):
            continue
        text = repr(value)
        shown = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
        raise JaxtuneError(
            f'adapter_config.json: "{key}"={shown} of a {kind} adapter is not supported: the '
            "tensors would mean something else without it"
        )
