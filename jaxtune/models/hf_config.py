"""Reading config.json: a value, or an error that names the key.

A null differs from an absent key: it has its meaning in transformers, or raises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.errors import JaxtuneError, shown
from jaxtune.vocabulary import RESIZE_HINT

_MISSING = object()
MOST_LAYERS = 1000
MOST_ROTATED = 2**16  # dimensions of a head, each pair of which has a frequency

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "per_layer_config": (None, {}),
    "attention_dropout": (None, 0),
    "partial_rotary_factor": (None, 1),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
    "clip_qkv": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None,),
    "attn_temperature_tuning": (None, False),
    "embedding_multiplier": (None, 1),
    "scale_emb": (None, 1),
    "residual_multiplier": (None, 1),
    "scale_depth": (None,),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "final_logit_softcapping": (None,),
}
"""Keys that change the computation of some models in transformers and that no architecture here
reads, with their neutral values."""


def read(
    config: Mapping[str, Any],
    key: str,
    kind: type,
    default: Any = _MISSING,
    *,
    null: Any = _MISSING,
) -> Any:
    """Returns `config[key]` in the type `kind`.

    Args:
      config: the content of config.json.
      key: to read.
      kind: type of the value; an int is accepted as a float, which must be finite.
      default: value of an absent key; without a default the key is required.
      null: value of a null; by default False for a bool and an error otherwise.

    Raises:
      JaxtuneError: a required key is absent, or its value has another type.
    """
    value = config.get(key, default)
    if value is None and null is not _MISSING:
        return null
    if value is _MISSING or (value is None and default is _MISSING):
        raise JaxtuneError(f'config.json lacks "{key}"')
    if value is None and kind is bool:
        return False
    if value is None:
        raise JaxtuneError(f'config.json: "{key}" is null, not of type {kind.__name__}')
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = as_float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise JaxtuneError(f'config.json: "{key}" is {shown(value)}, not of type {kind.__name__}')
    if isinstance(value, float) and not math.isfinite(value):
        raise JaxtuneError(f'config.json: "{key}" is {value}, not a finite number')
    return value


def positive(config: Mapping[str, Any], key: str, default: Any = _MISSING, *, most: float) -> float:
    """Returns a positive number; see `read`.

    Raises:
      JaxtuneError: the number is not positive or is more than `most`, which no real model reaches.
    """
    value = read(config, key, float, default)
    if not 0 < value <= most:
        raise JaxtuneError(
            f'config.json: "{key}" is {value:g}, not a positive number up to {most:g}'
        )
    return value


def size(
    config: Mapping[str, Any],
    key: str,
    default: Any = _MISSING,
    *,
    null: Any = _MISSING,
    least: int = 1,
    most: int = 2**24,
) -> int:
    """Returns a number of units, layers or tokens; see `read`.

    Raises:
      JaxtuneError: the number is not within `least` and `most`, which limits the memory that a
        hostile config.json can allocate before its tensors contradict it.
    """
    value = read(config, key, int, default, null=null)
    if not least <= value <= most:
        raise JaxtuneError(f'config.json: "{key}" is {shown(value)}, not within {least} and {most}')
    return value


def divisor(config: Mapping[str, Any], key: str, of: str, value: int) -> None:
    """Checks that the number `value` of the key `key` divides the number of the key `of`.

    Raises:
      JaxtuneError: it does not.
    """
    whole = size(config, of)
    if whole % value:
        raise JaxtuneError(f'config.json: "{of}" is {whole}, not a multiple of "{key}"={value}')


def require(config: Mapping[str, Any], key: str, supported: tuple[Any, ...]) -> None:
    """Checks that a setting is absent or one of the `supported` values.

    Raises:
      JaxtuneError: another value; the message names the key and the supported values.
    """
    if key not in config:
        return
    value = config[key]
    # 1 == True in Python, but they are different settings.
    if not any(
        value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported
    ):
        known = ", ".join("null" if one is None else repr(one) for one in supported)
        text = "null" if value is None else shown(value)
        raise JaxtuneError(f'config.json: "{key}"={text} is not supported (only {known})')


def check_supported(config: Mapping[str, Any]) -> None:
    """Checks settings that all architectures share and that are not read elsewhere.

    Raises:
      JaxtuneError: a setting that changes the computation; the message names it.
    """
    for key, values in NEUTRAL.items():
        require(config, key, values)
    require(config, "hidden_act", ("silu", "swish"))
    _check_windows(config)
    # Only checked: training compares it with the lengths of rows.
    size(config, "max_position_embeddings", 1, null=1, most=2**40)
    pad, vocabulary = read(config, "pad_token_id", int, None, null=None), size(config, "vocab_size")
    # In transformers a negative id counts from the end, and one beyond the vocabulary raises.
    if pad is not None and not -vocabulary <= pad < vocabulary:
        raise JaxtuneError(
            f'config.json: "pad_token_id" is {pad}, and the vocabulary has ids 0 to '
            f"{vocabulary - 1}; {RESIZE_HINT}"
        )


def as_float(value: int) -> float:
    """Returns an integer as a float: infinity if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_windows(config: Mapping[str, Any]) -> None:
    """Raises for layers with a sliding window.

    As in transformers ``layer_types`` has precedence; otherwise the layers from
    ``max_window_layers`` on have the window.
    """
    types = config.get("layer_types")
    if types is not None:
        types = read(config, "layer_types", list)
        others = [kind for kind in types if kind != "full_attention"]
        if others:
            raise JaxtuneError(
                f'config.json: "layer_types" has {shown(others[0])}; only full_attention is '
                "supported"
            )
        return
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return
    first = read(config, "max_window_layers", int, 28)
    layers = size(config, "num_hidden_layers")
    if first < layers:
        raise JaxtuneError(
            f'config.json: "use_sliding_window"={shown(config["use_sliding_window"])} is not '
            f'supported where layers have the window: "max_window_layers" is {first} of {layers} '
            "layers"
        )
