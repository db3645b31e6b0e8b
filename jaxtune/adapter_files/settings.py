"""The supported settings of adapter_config.json.

A setting may be used if jaxtune reads it, or if it does not change the meaning of the tensors. Any
other setting must be unset. Settings added by later versions of PEFT are unknown here and therefore
rejected by name where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtune.adapters.esft.esft import PEFT_TYPE as ESFT
from jaxtune.errors import JaxtuneError

# Read or without effect for every method: origin and purpose of the adapter.
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
# Without effect: the edited modules follow from the tensors (see agreement.py).
TARGETS = frozenset(
    [
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "target_modules",
    ]
)
_LENGTH = 60  # characters of a value in a message


class KnownSettings(NamedTuple):
    """The settings of one kind of adapter.

    Attributes:
      read: settings that are read.
      inert: settings that do not change the meaning of the tensors, such as how training started.
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
# Values of unused settings, if they are not null, false or empty.
UNUSED: Mapping[str, Any] = {"bias": "none"}


def check_settings(config: Mapping[str, Any]) -> None:
    """Checks that an adapter has no setting that would be ignored although it changes the result.

    Args:
      config: the content of adapter_config.json; an unknown ``peft_type`` is not checked, since
        looking up its method fails.

    Raises:
      JaxtuneError: an unsupported setting; the message names it.
    """
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        return
    known = ALWAYS | KINDS[kind].read | KINDS[kind].inert
    for key, value in config.items():
        # 0 and 0.0 count as unused too, since they are equal to False.
        if key in known or value in (None, False, "", [], {}, UNUSED.get(key)):
            continue
        text = repr(value)
        shown = text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"
        raise JaxtuneError(
            f'adapter_config.json: "{key}"={shown} of a {kind} adapter is not supported: '
            "ignoring it would change the result"
        )
