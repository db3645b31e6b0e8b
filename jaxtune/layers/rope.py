"""Rotary position embeddings with the scalings of transformers.

Source: Su et al., 2021; transformers' modeling_rope_utils.py for the scalings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import JaxtuneError, lookup, shown


@dataclasses.dataclass(frozen=True)
class Rope:
    """A rotary embedding: one frequency per pair of dimensions.

    Attributes:
      inv_freq: radians per position, float32 values, one for each of dim / 2 pairs.
      scale: factor on cos and sin (yarn's attention factor).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0

    def angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (cos, sin), each float32 [B, T, dim / 2], for positions int[B, T]."""
        inv_freq = jnp.asarray(self.inv_freq, jnp.float32)
        angles = positions.astype(jnp.float32)[..., None] * inv_freq
        return jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale


def rotate_half(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, heads, dim] with pairs (i, i + dim / 2); cos and sin are [B, T, dim / 2]."""
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def rotate_interleaved(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, T, heads, dim] with pairs (2i, 2i + 1), returned as pairs (i, i + dim / 2).

    The product of a query with a key does not depend on the order of the dimensions.
    """
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    x1, x2 = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def yarn_softmax_scale(config: Mapping[str, Any]) -> float:
    """Returns the factor on attention scores by yarn's ``mscale_all_dim``.

    Source: DeepSeek-V2's modeling code. It scales keys and queries, hence the square.
    """
    parameters = rope_parameters(config)
    weight = parameters.get("mscale_all_dim")
    if parameters["rope_type"] == "default" or not weight:
        return 1.0
    try:
        factor = parameters["factor"]
        return 1.0 if factor <= 1 else (0.1 * weight * math.log(factor) + 1.0) ** 2
    except (KeyError, TypeError) as error:
        raise _bad_number(parameters, error) from error


def _plain(parameters: Mapping[str, Any], dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return (1.0 / np.float32(parameters["rope_theta"]) ** exponents).astype(np.float32)


def _default(parameters: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    return _plain(parameters, dim), 1.0


def _linear(parameters: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    return _plain(parameters, dim) / np.float32(parameters["factor"]), 1.0


def _llama3(parameters: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """Divides low frequencies by `factor`, keeps high ones and interpolates between.

    A frequency is classified by its number of turns within the original context: at most
    `low_freq_factor` turns is low, at least `high_freq_factor` is high.
    """
    inv_freq, factor = _plain(parameters, dim), parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    if low > high:
        raise ValueError(f'"low_freq_factor"={low} is more than "high_freq_factor"={high}')
    turns = parameters["original_max_position_embeddings"] * inv_freq / (2 * np.float32(math.pi))
    smooth = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (1 - smooth) * inv_freq / np.float32(factor) + smooth * inv_freq, 1.0


def _yarn(parameters: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """Divides low frequencies by `factor`, keeps high ones, with a linear ramp between.

    A pair of dimensions that turns `beta_fast` times or more within the original context is kept;
    one that turns `beta_slow` times or less is divided. `boundary` is the (fractional) index of the
    pair with a given number of rotations: solving original · base^(−2 i / dim) = 2π · rotations
    for i. The ramp is linear in that index.

    Source: Peng et al., 2023 (YaRN), with the attention factor that transformers infers.
    """
    base, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters["factor"]
    factor = parameters["max_position_embeddings"] / original if factor is None else factor

    def boundary(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    fast, slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
    if fast < slow:
        raise ValueError(f'"beta_fast"={fast} is less than "beta_slow"={slow}')
    low, high = boundary(fast), boundary(slow)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    inv_freq = _plain(parameters, dim)
    inv_freq = inv_freq / np.float32(factor) * ramp + inv_freq * (1 - ramp)
    return inv_freq.astype(np.float32), _yarn_attention_factor(parameters, factor)


def _yarn_attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return mscale(numerator) / mscale(denominator)
    return mscale(1.0)


ROPE_TYPES: dict[str, Callable[[Mapping[str, Any], int], tuple[np.ndarray, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


# Types whose frequencies depend on the context length before the extension.
_STRETCHED = ("llama3", "yarn")
_ENTRIES = ("rope_scaling", "rope_parameters")
# The largest value of each number; no real model comes near it.
_POSITIVE = {
    "rope_theta": 1e15,
    "factor": 1e6,
    "original_max_position_embeddings": 1e12,
    "low_freq_factor": 1e6,
    "high_freq_factor": 1e6,
    "attention_factor": 1e3,
}
# Zero is the same as none.
_OR_ZERO = {"beta_fast": 1e6, "beta_slow": 1e6, "mscale": 1e3, "mscale_all_dim": 1e3}


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings of a config.json in the newer style, with ``rope_type``.

    Args:
      config: the content of config.json, with the newer ``rope_parameters`` or the older
        ``rope_theta`` and ``rope_scaling``.

    Raises:
      JaxtuneError: both are given and differ, or a setting is not supported.
    """
    found = {key: _normalized(config, key) for key in _ENTRIES if config.get(key) not in (None, {})}
    if len(found) == 2:
        # transformers would read the older entry and ignore the rotary base of the newer one.
        old, new = (found[key] for key in _ENTRIES)
        differing = [key for key in {**new, **old} if old.get(key) != new.get(key)]
        if differing:
            text = ", ".join(
                f"{key}: {shown(old.get(key))} and {shown(new.get(key))}" for key in differing
            )
            raise JaxtuneError(
                f"config.json: rope_scaling and rope_parameters differ ({text}): keep all "
                "settings in rope_parameters and remove rope_scaling"
            )
    return next(iter(found.values()), None) or _normalized(config, _ENTRIES[1])


def _normalized(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    entry = {} if config.get(key) is None else config[key]
    if not isinstance(entry, Mapping):
        raise JaxtuneError(f"config.json: {key} is {shown(entry)}, not an object")
    nested = [name for name, value in entry.items() if isinstance(value, Mapping)]
    if nested:
        raise JaxtuneError(
            f'config.json: {key} has settings of its own for "{nested[0]}", which is not supported'
        )
    parameters = dict(entry)
    old_name = parameters.pop("type", "default")
    kind = parameters.setdefault("rope_type", old_name)
    if kind is None:
        raise JaxtuneError(f"config.json: {key} has rope_type null: name one, or leave it out")
    parameters["rope_type"] = str(kind)
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if parameters["rope_theta"] is None:
        raise JaxtuneError("config.json: rope_theta is null")
    if parameters.pop("partial_rotary_factor", None) not in (None, 1):
        raise JaxtuneError("config.json: partial_rotary_factor other than 1 is not supported")
    if parameters["rope_type"] in _STRETCHED:
        name, longest = "original_max_position_embeddings", config.get("max_position_embeddings")
        parameters["max_position_embeddings"] = longest
        if name in config:  # has precedence, as in transformers
            parameters[name] = config[name]
        elif longest is not None:
            parameters.setdefault(name, longest)
    _check_numbers(parameters)
    return parameters


def _check_numbers(parameters: Mapping[str, Any]) -> None:
    """Raises for values outside their range; nulls are checked in use."""
    for key, most in {**_POSITIVE, **_OR_ZERO}.items():
        value = parameters.get(key)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        zero = key in _OR_ZERO
        if not number or not 0 <= value <= most or (value == 0 and not zero):
            wanted = f"{'zero or ' if zero else ''}a positive number up to {most:g}"
            raise _bad_number(parameters, ValueError(f'"{key}" is {shown(value)}, not {wanted}'))
    if not isinstance(parameters.get("truncate"), (bool, NoneType)):
        value = parameters["truncate"]
        raise _bad_number(
            parameters, ValueError(f'"truncate" is {shown(value)}, not true or false')
        )


def rope_from_config(config: Mapping[str, Any], dim: int) -> Rope:
    """Reads the rotary embedding of a Hugging Face config.

    Args:
      config: the content of config.json.
      dim: number of rotated dimensions per head.

    Raises:
      JaxtuneError: an unknown rope type, or a scaling with a missing or invalid number.
    """
    parameters = rope_parameters(config)
    if dim % 2:
        raise JaxtuneError(f"config.json: heads of {dim} dimensions do not split into pairs")
    kind = parameters["rope_type"]
    build = lookup(ROPE_TYPES, kind, "config.json: rope_type")
    try:
        with np.errstate(all="ignore"):
            inv_freq, scale = build(parameters, dim)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise _bad_number(parameters, error) from error
    if not (np.isfinite(inv_freq).all() and math.isfinite(scale)):
        raise JaxtuneError(
            f"config.json: rope_type {kind} has numbers that give no finite frequencies"
        )
    return Rope(tuple(float(f) for f in inv_freq), scale)


def _bad_number(parameters: Mapping[str, Any], error: Exception) -> JaxtuneError:
    where = f"config.json: rope_type {parameters['rope_type']}"
    if isinstance(error, KeyError):
        return JaxtuneError(f"{where} lacks {error}")
    # Some nulls are valid (attention_factor), so the error names one only after a failure.
    nulls = [key for key, value in parameters.items() if value is None]
    reason = f"{nulls[0]} is null" if nulls and isinstance(error, TypeError) else str(error)
    return JaxtuneError(f"{where} has a bad number: {reason}")
