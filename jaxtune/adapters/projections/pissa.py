"""PiSSA: LoRA that starts from the leading singular vectors of each weight.

The base is edited once, while it streams in: with A₀ and B₀ the starting factors, the frozen weight
is W − s B₀ A₀, so that base and adapter together equal the checkpoint at the start.

The stored adapter is plain LoRA for the unedited checkpoint. Relative to W the edit is
s B A − s B₀ A₀ = s [B, −B₀] [A; A₀], which has twice the rank; its second half restores the edited
base when a run is resumed.

Source: Meng et al., 2024 (PiSSA).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import svds

from jaxtune.adapters.method import BaseEdit, Start, StoredAdapter
from jaxtune.adapters.projections.factors import Factor
from jaxtune.adapters.projections.lora import Lora, LoraAdapter, settings_from_config
from jaxtune.adapters.projections.peft_files import PREFIX
from jaxtune.adapters.projections.slots import adapters, pack
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.linear import Projection
from jaxtune.layers.tree import (
    Constant,
    Path,
    Tree,
    declaration_of,
    flatten,
    merge,
    parameter,
    unflatten,
)
from jaxtune.models.definition import Definition

# From this size on, an iterative solver for the leading vectors is faster than a full SVD.
_LARGE = 512
_STARTS = {"lora_A": "start_A", "lora_B": "start_B"}


class PissaAdapter(LoraAdapter):
    """LoRA's factors, and the ones from which they started."""

    def __init__(self, linear: Projection, factors: tuple[Factor | None, ...], dropout: float):
        super().__init__(linear, factors, dropout)
        experts = declaration_of(linear.weight).experts
        for factor, start in _STARTS.items():
            declared = declaration_of(getattr(self, factor))
            setattr(
                self, start, parameter(declared.shape, declared.axes, "zeros", Constant, experts)
            )


class _Subtract(BaseEdit):
    """Subtracts the principal part from each weight and keeps its factors.

    Attributes:
      tensors: starting factors by PEFT's keys. Factors passed to the constructor are reused;
        the others are computed when their weight streams in.
    """

    def __init__(self, factors: Mapping[str, Factor], tensors: Mapping[str, np.ndarray]):
        self._factors = {f"{name}.weight": factor for name, factor in factors.items()}
        self.names = list(self._factors)
        self.tensors = dict(tensors)

    def __call__(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Returns W − s B₀ A₀, float32 [out, in]; at most two arrays of this shape are held."""
        factor = self._factors[name]
        if factor.rank > min(weight.shape):
            raise JaxtuneError(
                f"adapter.rank={factor.rank} exceeds the number of singular values of {name}, "
                f"{min(weight.shape)}"
            )
        module = PREFIX + name.removesuffix(".weight")
        keys = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if keys[0] not in self.tensors:
            self.tensors |= zip(keys, principal_factors(weight, factor), strict=True)
        lora_A, lora_B = (self.tensors[key] for key in keys)
        changed = lora_B @ lora_A
        changed *= np.float32(-factor.scale)
        changed += weight
        return changed


def principal_factors(weight: np.ndarray, factor: Factor) -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 A [r, in] and B [out, r] whose scaled product is the best rank-r fit of W.

    With W = U S Vᵀ and s the scale: A = √(S/s) Vᵀ and B = U √(S/s), leading r components.
    """
    if min(weight.shape) < _LARGE or factor.rank >= min(weight.shape) // 2:
        left, values, right = np.linalg.svd(weight, full_matrices=False)
    else:
        # The start vector is fixed, so that a resumed run computes the same factors. svds returns
        # singular values in ascending order.
        start = np.ones(min(weight.shape), np.float32)
        found: Any = svds(weight, k=factor.rank, v0=start)
        left, values, right = found[0][:, ::-1], found[1][::-1], found[2][::-1]
    rank = factor.rank
    roots = np.sqrt(values[:rank] / factor.scale)
    lora_A, lora_B = roots[:, None] * right[:rank], left[:, :rank] * roots
    return lora_A.astype(np.float32), lora_B.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pissa(Lora):
    """PiSSA, with the settings of LoRA."""

    name: ClassVar[str] = "pissa"
    edits_base: ClassVar[bool] = True

    def adapter(self, linear: Projection, settings: tuple[Factor | None, ...]) -> PissaAdapter:
        """Builds the abstract factors and starting factors."""
        return PissaAdapter(linear, settings, self.dropout)

    def base_edit(self, definition: Definition, stored: StoredAdapter | None) -> _Subtract:
        """Returns the edit that subtracts the principal part of every target.

        A stored adapter contains the starting factors, which are then reused.

        Raises:
          JaxtuneError: alpha is 0, so that the scaled product of factors is always zero.
        """
        factors = {
            name: setting
            for _, names, adapter in adapters(definition)
            for name, setting in zip(names, adapter.settings, strict=True)
            if isinstance(setting, Factor)
        }
        if any(factor.scale == 0 for factor in factors.values()):
            raise JaxtuneError("adapter.alpha must not be 0 with adapter.method=pissa")
        return _Subtract(factors, {} if stored is None else _halves(stored)[1])

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Sets the factors, and constant copies of them, to those subtracted from the base."""
        trainable, constants = super().complete(definition, weights, trees, start)
        if start is None:
            return trainable, constants
        assert isinstance(start.base_edit, _Subtract)
        first = pack(definition, StoredAdapter({}, start.base_edit.tensors))[0]
        return merge(trainable, first), merge(constants, _as_starts(first))

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns [A; A₀] and [B, −B₀]: plain LoRA for the unedited checkpoint."""
        names = {start: factor for factor, start in _STARTS.items()}
        started: dict[Path, Any] = {
            (*path[:-1], names[path[-1]]): value
            for path, value in flatten(constants)
            if path[-1] in names
        }
        trained = super().store(definition, trainable, constants)
        first = super().store(definition, merge(trainable, unflatten(started)), constants)
        tensors = trained.tensors
        for key, value in tensors.items():
            if key.endswith("lora_A.weight"):
                tensors[key] = np.concatenate([value, first.tensors[key]], axis=0)
            elif key.endswith("lora_B.weight"):
                tensors[key] = np.concatenate([value, -first.tensors[key]], axis=1)
        return StoredAdapter(trained.config, tensors)

    def restore_edits(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Splits [A; A₀] and [B, −B₀] into trained and starting factors."""
        trained, first = _halves(stored)
        alone = StoredAdapter(stored.config, trained)
        trainable, constants = super().restore_edits(definition, alone)
        started = pack(definition, StoredAdapter({}, first))[0]
        return trainable, merge(constants, _as_starts(started))

    def peft_config(self, definition: Definition, settings: Mapping[str, Factor]) -> dict[str, Any]:
        """Returns LoRA's config with twice the rank and an alpha that gives the same scale."""
        doubled = {
            name: dataclasses.replace(
                factor,
                rank=2 * factor.rank,
                alpha=factor.alpha * (math.sqrt(2) if factor.rslora else 2),
            )
            for name, factor in settings.items()
        }
        return super().peft_config(definition, doubled)


def _as_starts(trainable: Tree) -> Tree:
    """Returns copies of factors under the names of the constants for starting factors.

    Copies are needed because the training step donates the buffers of trainable arrays.
    """
    return unflatten(
        {(*path[:-1], _STARTS[path[-1]]): jnp.copy(value) for path, value in flatten(trainable)}
    )


def _halves(stored: StoredAdapter) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the trained tensors (and all that are not factors) and the starting factors."""
    trained, first = dict(stored.tensors), {}
    for key, value in stored.tensors.items():
        if key.endswith("lora_A.weight"):
            trained[key], first[key] = np.split(value, 2, axis=0)
        elif key.endswith("lora_B.weight"):
            trained[key], minus = np.split(value, 2, axis=1)
            first[key] = -minus
    return trained, first


def from_config(section: AdapterConfig) -> Pissa:
    """Returns the method that the ``adapter`` section of a config describes."""
    return Pissa(**settings_from_config(section))
