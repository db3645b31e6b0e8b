"""The settings of adapter_config.json: which of them are read, and their valid values.

A setting may be used if jaxtune reads it, or if it does not change the meaning of the tensors. Any
other setting must be unset. Settings added by later versions of PEFT are unknown here and therefore
rejected by name where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtune.adapters.esft.esft import PEFT_TYPE as ESFT
from jaxtune.errors import JaxtuneError, shown


class Valid(NamedTuple):
    """The valid values of a setting.

    Attributes:
      text: description for messages.
      check: returns whether a value is valid; it is not asked about a null.
      null: whether a null is valid.
    """

    text: str
    check: Callable[[Any], bool]
    null: bool = True


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and -_LARGEST <= value <= _LARGEST  # not NaN


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= _LARGEST


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_mapping(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(check, value.values()))


def _is_layers(value: Any) -> bool:
    return all(type(one) is int for one in (value if isinstance(value, list) else [value]))


_LARGEST = 2**31 - 1  # no rank, alpha or size comes near it
_ANYTHING = Valid("anything", lambda value: True)
_FLAG = Valid("true or false", lambda value: isinstance(value, bool))
_STRING = Valid("a string", lambda value: isinstance(value, str))
_OBJECT = Valid("an object", lambda value: isinstance(value, dict))
_NUMBER = Valid(f"a number up to {_LARGEST}", _is_number)
_COUNT = Valid("a positive integer", _is_count)
_SIZE = _COUNT._replace(null=False)
_RATE = Valid("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1)
_NAMES = Valid("a list of names", _is_names)
_SELECTOR = Valid(
    "a list of names or a pattern", lambda value: isinstance(value, str) or _is_names(value)
)
_START = Valid("true, false or a string", lambda value: isinstance(value, (bool, str)))
# Tasks whose model has other tensors or outputs are left out.
TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")

VALID: dict[str, Valid] = {
    "alpha_pattern": Valid(
        f"an object of numbers up to {_LARGEST}", lambda value: _is_mapping(value, _is_number)
    ),
    "auto_mapping": _OBJECT,
    "base_model_name_or_path": _STRING,
    "bias": Valid('"none", "all" or "lora_only"', ("none", "all", "lora_only").__contains__),
    "corda_config": _OBJECT,
    "d_initial": _NUMBER,
    "encoder_dropout": _RATE,
    "encoder_hidden_size": _COUNT,
    "encoder_num_layers": _COUNT,
    "encoder_reparameterization_type": _STRING,
    "ensure_weight_tying": _FLAG,
    "eva_config": _OBJECT,
    "exclude_modules": _SELECTOR,
    "experts": _ANYTHING,  # checked where it is read, like the other settings of ESFT
    "feedforward_modules": _SELECTOR,
    "inference_mode": _FLAG,
    "init_ia3_weights": _START,
    "init_lora_weights": _START,
    "init_weights": _START,
    "kv_lora_rank": _COUNT,
    "layers_pattern": _SELECTOR,
    "layers_to_transform": Valid("a layer or a list of layers", _is_layers),
    "loftq_config": _OBJECT,
    "lora_alpha": _NUMBER._replace(null=False),
    "lora_dropout": _RATE,
    "lora_ga_config": _OBJECT,
    "megatron_core": _STRING,
    "modules_to_save": _NAMES,
    "non_expert_modules": _ANYTHING,
    "num_attention_heads": _COUNT,
    "num_layers": _COUNT,
    "num_transformer_submodules": _COUNT,
    "num_virtual_tokens": _SIZE,
    "peft_type": _STRING,
    "peft_version": _STRING,
    "prefix_projection": _FLAG,
    "projection_prng_key": _NUMBER,
    "prompt_tuning_init": _STRING,
    "prompt_tuning_init_text": _STRING,
    "qalora_group_size": _COUNT,
    "qk_rope_head_dim": _COUNT,
    "r": _SIZE,
    "rank_pattern": Valid(
        "an object of positive integers", lambda value: _is_mapping(value, _is_count)
    ),
    "revision": _STRING,
    "runtime_config": _ANYTHING,  # PEFT drops it
    "save_projection": _FLAG,
    "shared_experts": _ANYTHING,
    "target_modules": _SELECTOR,
    "target_parameters": _NAMES,
    "task_type": Valid(" or ".join(f'"{task}"' for task in TASKS), TASKS.__contains__),
    "token_dim": _COUNT,
    "tokenizer_kwargs": _OBJECT,
    "tokenizer_name_or_path": _STRING,
    "trainable_token_indices": _ANYTHING,  # checked with the rows
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
    "vera_dropout": _RATE,
}
"""The valid values of each setting that may be used."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Read or without effect for every method: origin and purpose of the adapter.
ALWAYS = _names(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision "
    "runtime_config task_type"
)
# Compared with the tensors, which decide what is edited (see agreement.py).
TARGETS = _names(
    "exclude_modules layers_pattern layers_to_transform modules_to_save target_modules"
)
_PROMPT = _names(
    "num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim"
)


class KnownSettings(NamedTuple):
    """The settings of one kind of adapter.

    Attributes:
      read: settings that are read.
      inert: settings that do not change the meaning of the tensors, such as how training started.
      refused: settings that change it and have to be unset, like those that are not known.
    """

    read: frozenset[str]
    inert: frozenset[str] = frozenset()
    refused: frozenset[str] = frozenset()


def _settings(
    read: str, inert: str = "", refused: str = "", common: frozenset[str] = TARGETS
) -> KnownSettings:
    return KnownSettings(_names(read) | common, _names(inert), _names(refused))


_PREFIX = _settings(
    "encoder_hidden_size prefix_projection", "init_weights", "modules_to_save", _PROMPT
)

KINDS: dict[str, KnownSettings] = {
    "LORA": _settings(
        "alpha_pattern bias init_lora_weights lora_alpha lora_dropout r rank_pattern "
        "target_parameters trainable_token_indices use_dora use_rslora",
        # With ensure_weight_tying the tensors of a tied head are in the file.
        "corda_config ensure_weight_tying eva_config loftq_config lora_ga_config megatron_core "
        "qalora_group_size",
        "alora_invocation_tokens arrow_config fan_in_fan_out kasa_config layer_replication "
        "lora_bias megatron_config monteclora_config use_bdlora use_qalora velora_config",
    ),
    "IA3": _settings("feedforward_modules", "init_ia3_weights", "fan_in_fan_out"),
    "BITFIT": _settings(""),
    "VERA": _settings(
        "r vera_dropout",
        "d_initial init_weights projection_prng_key save_projection",
        "bias fan_in_fan_out",
    ),
    ESFT: _settings("experts non_expert_modules shared_experts"),
    "PREFIX_TUNING": _PREFIX,
    "LATENT_PREFIX": _PREFIX._replace(read=_PREFIX.read | {"kv_lora_rank", "qk_rope_head_dim"}),
    "PROMPT_TUNING": _settings(
        "",
        "prompt_tuning_init prompt_tuning_init_text tokenizer_kwargs tokenizer_name_or_path",
        "modules_to_save",
        _PROMPT,
    ),
    "P_TUNING": _settings(
        "encoder_dropout encoder_hidden_size encoder_num_layers encoder_reparameterization_type",
        "",
        "modules_to_save",
        _PROMPT,
    ),
}
# Values of unset settings, besides null, false, "" and []. An empty object is not one: PEFT reads
# `kasa_config={}` as the default values of KaSA.
UNSET: Mapping[str, Any] = {"bias": "none"}


def check_settings(config: Mapping[str, Any]) -> None:
    """Checks the values of an adapter's settings, and that none would be ignored.

    Args:
      config: the content of adapter_config.json; an unknown ``peft_type`` is not checked, since
        looking up its method fails.

    Raises:
      JaxtuneError: an unsupported setting or value; the message names the setting.
    """
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        return
    known = ALWAYS | KINDS[kind].read | KINDS[kind].inert
    for key, value in config.items():
        if key in known:
            valid = VALID[key]
            if not (valid.null if value is None else valid.check(value)):
                raise JaxtuneError(
                    f'adapter_config.json: "{key}"={_text(value)} is not {valid.text}'
                )
        elif not _is_unset(key, value):
            raise JaxtuneError(
                f'adapter_config.json: "{key[:60]}"={_text(value)} of a {kind} adapter is not '
                "supported: ignoring it would change the result"
            )


def _is_unset(key: str, value: Any) -> bool:
    return value is None or value is False or value in ("", [], UNSET.get(key))


def _text(value: Any) -> str:
    return "null" if value is None else shown(value)
