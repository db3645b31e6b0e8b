"""LoRA: a trained low-rank edit W + (alpha / r) · B A of a frozen weight.

Source: Hu et al., 2021.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.method import BASE_COPY, Method, Stored
from jaxtune.adapters.targets import Projection, linears, match_targets, module_names
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import LowRank
from jaxtune.layers.tree import (
    Constant,
    Path,
    Trainable,
    Tree,
    declaration_of,
    flatten,
    parameter,
    stack,
    unflatten,
)
from jaxtune.models.definition import Definition

_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")


@dataclasses.dataclass(frozen=True)
class Factor:
    """Rank and alpha of one projection of one layer; rank 0 leaves it as it is."""

    rank: int = 0
    alpha: float = 0.0

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank if self.rank else 0.0


class LoraAdapter(nnx.Module):
    """The factors of a projection, in every layer of its run.

    Layers of lower rank are padded with zeros, which stay zero: each factor's gradient is a
    product with the other.
    """

    def __init__(self, linear: Projection, factors: tuple[Factor, ...], dropout: float):
        rank = max(factor.rank for factor in factors)
        declared = declaration_of(linear.weight)
        (out_axis, in_axis), experts = declared.axes, declared.experts
        shape_A, shape_B = (rank, linear.in_features), (linear.out_features, rank)
        axes_A, axes_B = ("rank", in_axis), (out_axis, "rank")
        self.lora_A = parameter(shape_A, axes_A, kind=Trainable, experts=experts)
        self.lora_B = parameter(shape_B, axes_B, "zeros", kind=Trainable, experts=experts)
        self.scale = parameter((), (), "ones", kind=Constant, experts=experts)
        self.factors = factors
        self.dropout = dropout

    def edit(self) -> LowRank:
        """Returns the factors and their scale."""
        return LowRank(self.lora_A.get_value(), self.lora_B.get_value(), self.scale.get_value())

    def drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Drops inputs [..., in] of the low-rank branch at random, scaled to keep their mean."""
        if key is None or self.dropout == 0:
            return x
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Lora(Method):
    """LoRA with its settings.

    Attributes:
      rank: r of every target.
      alpha: the scale is alpha / r.
      dropout: on the input of the low-rank branch.
      targets: see `match_targets`.
      factors: by Hugging Face module name, in place of the three above; how an adapter that was
        read from disk says what it has.
    """

    name: ClassVar[str] = "lora"

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    factors: tuple[tuple[str, Factor], ...] = ()

    def attach(self, model: CausalLM) -> None:
        """Fills the adapter slot of every matched projection."""
        modules = linears(model)
        chosen = self._choose([n for path, m in modules.items() for n in module_names(path, m)])
        for path, linear in modules.items():
            factors = tuple(chosen.get(n, Factor()) for n in module_names(path, linear))
            if not any(factor.rank for factor in factors):
                continue
            if path == ("lm_head",) and self.dropout:
                raise JaxtuneError("adapter.dropout must be 0 where adapter.targets has lm_head")
            adapter = LoraAdapter(linear, factors, self.dropout)
            layers = declaration_of(linear.weight).layers
            linear.adapter = stack(adapter, *layers) if layers else adapter

    def _choose(self, names: list[str]) -> dict[str, Factor]:
        for name, _ in self.factors:
            if name not in names:
                raise JaxtuneError(f"the adapter edits {name}, which the model does not have")
        if self.factors:
            return dict(self.factors)
        return dict.fromkeys(match_targets(self.targets, names), Factor(self.rank, self.alpha))

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Draws A uniformly from ±1/√in, as PEFT does, and sets B to zero: the identity."""

        def draw(path: Path, adapter: LoraAdapter) -> dict[str, np.ndarray]:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
            shape = adapter.lora_A.get_value().shape
            bound = shape[-1] ** -0.5
            values = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
            # One layer's factors at a time, cut to their rank: `_pack` pads them again.
            return {
                "lora_A": np.asarray(values).reshape(len(adapter.factors), *shape[-2:]),
                "lora_B": np.zeros(
                    (len(adapter.factors), *adapter.lora_B.get_value().shape[-2:]), np.float32
                ),
            }

        return _pack(definition, {path: draw(path, a) for path, a in _adapters(definition)})

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> Stored:
        """Returns adapter_config.json and the factors of each projection of each layer."""
        del constants
        values = dict(flatten(trainable))
        tensors: dict[str, np.ndarray] = {}
        factors: dict[str, Factor] = {}
        for path, linear in linears(definition.module).items():
            if linear.adapter is None:
                continue
            names = module_names(path, linear)
            lora_A, lora_B = (
                np.asarray(values[(*path, "adapter", f)], np.float32) for f in ("lora_A", "lora_B")
            )
            lora_A = lora_A.reshape(len(names), *lora_A.shape[-2:])
            lora_B = lora_B.reshape(len(names), *lora_B.shape[-2:])
            for i, (name, factor) in enumerate(zip(names, linear.adapter.factors, strict=True)):
                if factor.rank:
                    factors[name] = factor
                    tensors[f"{_PREFIX}{name}.lora_A.weight"] = lora_A[i, : factor.rank].copy()
                    tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora_B[i, :, : factor.rank].copy()
        return Stored(_peft_config(definition, factors, self.dropout), tensors)

    def restore(self, definition: Definition, stored: Stored) -> tuple[Tree, Tree]:
        """Packs PEFT's tensors into stacked factors."""
        packed: dict[Path, dict[str, np.ndarray]] = {}
        for path, linear in linears(definition.module).items():
            adapter = linear.adapter
            if adapter is None:
                continue
            names = module_names(path, linear)
            rank = max(factor.rank for factor in adapter.factors)
            lora_A = np.zeros((len(names), rank, linear.in_features), np.float32)
            lora_B = np.zeros((len(names), linear.out_features, rank), np.float32)
            for i, (name, factor) in enumerate(zip(names, adapter.factors, strict=True)):
                if factor.rank:
                    lora_A[i, : factor.rank] = _tensor(
                        stored, name, "lora_A", (factor.rank, linear.in_features)
                    )
                    lora_B[i, :, : factor.rank] = _tensor(
                        stored, name, "lora_B", (linear.out_features, factor.rank)
                    )
            packed[path] = {"lora_A": lora_A, "lora_B": lora_B}
        return _pack(definition, packed)


def _adapters(definition: Definition) -> Iterator[tuple[Path, LoraAdapter]]:
    for path, linear in linears(definition.module).items():
        if linear.adapter is not None:
            yield path, linear.adapter


def _pack(
    definition: Definition, values: Mapping[Path, Mapping[str, np.ndarray]]
) -> tuple[Tree, Tree]:
    """Makes the two trees from factors by projection, each [layers, …], zeroing what pads."""
    trainable: dict[Path, jax.Array] = {}
    constants: dict[Path, jax.Array] = {}
    for path, adapter in _adapters(definition):
        ranks = np.array([factor.rank for factor in adapter.factors])
        kept = np.arange(ranks.max()) < ranks[:, None]
        factors = {
            "lora_A": np.where(kept[:, :, None], values[path]["lora_A"], 0),
            "lora_B": np.where(kept[:, None, :], values[path]["lora_B"], 0),
        }
        for name, value in factors.items():
            shape = getattr(adapter, name).get_value().shape
            trainable[(*path, "adapter", name)] = jnp.asarray(value, jnp.float32).reshape(shape)
        scales = jnp.asarray([factor.scale for factor in adapter.factors], jnp.float32)
        constants[(*path, "adapter", "scale")] = scales.reshape(adapter.scale.get_value().shape)
    return unflatten(trainable), unflatten(constants)


def _tensor(stored: Stored, name: str, factor: str, shape: tuple[int, ...]) -> np.ndarray:
    value = stored.tensors[f"{_PREFIX}{name}.{factor}.weight"]
    if value.shape != shape:
        raise JaxtuneError(
            f"adapter_model.safetensors: {name}.{factor} has shape {list(value.shape)}, "
            f"the model needs {list(shape)}"
        )
    return value.astype(np.float32)


def _peft_config(
    definition: Definition, factors: Mapping[str, Factor], dropout: float
) -> dict[str, Any]:
    """Writes adapter_config.json: the commonest rank and alpha, and patterns for the others."""
    common = Counter(factors.values()).most_common(1)[0][0]
    suffixes = {name.rsplit(".", 1)[-1] for name in factors}
    every = [n for p, m in linears(definition.module).items() for n in module_names(p, m)]
    by_suffix = {n for n in every if n.rsplit(".", 1)[-1] in suffixes}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": definition.config.get("_name_or_path"),
        "r": common.rank,
        "lora_alpha": int(common.alpha) if common.alpha == int(common.alpha) else common.alpha,
        "lora_dropout": dropout,
        # Short names where they say it all; whole paths where only some layers are edited.
        "target_modules": sorted(suffixes if by_suffix == set(factors) else factors),
        "rank_pattern": {n: f.rank for n, f in factors.items() if f.rank != common.rank},
        "alpha_pattern": {n: f.alpha for n, f in factors.items() if f.alpha != common.alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


# Settings of adapter_config.json under which the factors would mean something else.
_UNSUPPORTED = {
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


def from_peft(stored: Stored) -> Lora:
    """Returns the method, with its settings, of a LoRA adapter that PEFT wrote.

    Raises:
      JaxtuneError: a setting or a tensor that jaxtune would have to drop.
    """
    config = stored.config
    for key, plain in _UNSUPPORTED.items():
        if config.get(key) not in (plain, None, [], {}):
            raise JaxtuneError(f'adapter_config.json: "{key}"={config[key]!r} is not supported')
    factors: dict[str, Factor] = {}
    for key, value in stored.tensors.items():
        if key.endswith(BASE_COPY):
            continue  # not an edit; who loads the base compares the two
        match = _KEY.fullmatch(key)
        if match is None or value.ndim != 2 or not jnp.issubdtype(value.dtype, jnp.floating):
            raise JaxtuneError(f'adapter_model.safetensors: "{key}" is not a LoRA factor')
        name, rank = match[1], value.shape[0 if match[2] == "lora_A" else -1]
        alpha = _pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
        if config.get("use_rslora"):
            alpha = alpha * rank**0.5  # so that alpha / r is alpha / √r
        other = "lora_B" if match[2] == "lora_A" else "lora_A"
        if f"{_PREFIX}{name}.{other}.weight" not in stored.tensors:
            raise JaxtuneError(f'adapter_model.safetensors: "{name}" lacks {other}')
        factors[name] = Factor(rank, alpha)
    if not factors:
        raise JaxtuneError("adapter_model.safetensors holds no LoRA factors")
    dropout = _number("lora_dropout", config.get("lora_dropout") or 0.0)
    if not 0 <= dropout < 1:
        raise JaxtuneError(f'adapter_config.json: "lora_dropout"={dropout} is not within 0 and 1')
    return Lora(dropout=dropout, factors=tuple(sorted(factors.items())))


def _pattern(patterns: Any, name: str, default: Any) -> float:
    """Looks a module up as PEFT does: the first pattern that matches the end of its path."""
    if not isinstance(patterns, Mapping):
        raise JaxtuneError(f'adapter_config.json: "alpha_pattern" is {patterns!r}, not an object')
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return _number("alpha_pattern", value)
        except re.error as error:
            raise JaxtuneError(
                f'adapter_config.json: "alpha_pattern" has no valid expression: {error}'
            ) from None
    return _number("lora_alpha", default)


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise JaxtuneError(f'adapter_config.json: "{key}" has {value!r}, which is no number')
    return float(value)


def from_config(section: Any) -> Lora:
    """Returns the method that the ``adapter`` section of a config describes."""
    return Lora(section.rank, section.alpha, section.dropout, tuple(section.targets))
