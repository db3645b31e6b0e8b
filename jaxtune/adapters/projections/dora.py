"""DoRA: LoRA with a trained magnitude for each row of the edited weight.

The edited weight is m · (W + s B A) / ‖W + s B A‖, with norms over rows. The norm needs the whole
matrix W + s B A, which is never formed: ‖W‖² is computed once when training starts and kept as a
constant, and each step adds the difference ‖W + s B A‖² − ‖W‖² from products of rank r.

Source: Liu et al., 2024 (DoRA); gradients do not pass through the norm (its section 4.3).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxtune.adapters.method import Start, StoredAdapter
from jaxtune.adapters.projections.factors import Factor, read_settings
from jaxtune.adapters.projections.lora import Lora, LoraAdapter, settings_from_config
from jaxtune.adapters.projections.slots import AdapterPart, adapters
from jaxtune.config import AdapterConfig
from jaxtune.layers.linear import Edit, LowRank, Projection, product
from jaxtune.layers.tree import (
    Constant,
    Trainable,
    Tree,
    declaration_of,
    flatten,
    parameter,
    unflatten,
)
from jaxtune.models.definition import Definition
from jaxtune.quant import materialize


class DoraAdapter(LoraAdapter):
    """The factors and magnitudes of a projection, and the squared row norms of its base weight."""

    def __init__(self, linear: Projection, factors: tuple[Factor | None, ...], dropout: float):
        super().__init__(linear, factors, dropout)
        declared = declaration_of(linear.weight)
        shape, axes, experts = (linear.out_features,), declared.axes[:1], declared.experts
        self.lora_magnitude_vector = parameter(shape, axes, "ones", Trainable, experts)
        self.squares = parameter(shape, axes, "ones", Constant, experts)

    def parts(self, setting: Factor) -> dict[str, AdapterPart]:
        """Returns the factors and the magnitudes."""
        magnitude = AdapterPart(".lora_magnitude_vector", (self.out_features,))
        return super().parts(setting) | {"lora_magnitude_vector": magnitude}

    def start(self, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Initialises factors as LoRA does; magnitudes [out] are set by `complete`."""
        if name == "lora_magnitude_vector":
            return jnp.ones(shape)
        return super().start(name, shape, key)

    def derived(self, weight: Any) -> dict[str, jax.Array]:
        """Returns the squared norm of each row of the weight, float32 [out]."""
        return {"squares": jnp.sum(materialize(weight, jnp.float32) ** 2, axis=1)}

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Adds the low-rank term and gives each row of the sum its magnitude [out]."""
        del bias
        term, squares = self.low_rank(), self.squares.get_value()
        added = functools.partial(_added_squares, dtype=dtype)
        frozen = lax.stop_gradient((weight, term))
        # lax.map goes over experts one by one, so that only one is dequantized at a time.
        more = added(frozen) if term.lora_A.ndim == 2 else lax.map(added, frozen)
        # Rows of zeros, and layers without an adapter, have no direction: their scale stays 1.
        has_norm = squares > 0
        norm = jnp.sqrt(jnp.where(has_norm, jnp.maximum(squares + more, _TINY), 1.0))
        return Edit(term, jnp.where(has_norm, self.lora_magnitude_vector.get_value() / norm, 1.0))


_TINY = float(jnp.finfo(jnp.float32).tiny)  # avoids a division by 0 if the edit cancels a row


def _added_squares(frozen: tuple[Any, LowRank], dtype: DTypeLike) -> jax.Array:
    """Returns ‖W + s B A‖² − ‖W‖² of each row, float32 [out], without forming B A.

    Row by row the difference is 2 s ⟨b, A w⟩ + s² ⟨b, (A Aᵀ) b⟩, where w is the row of W and b
    that of B.
    """
    weight, (lora_A, lora_B, scale, _) = frozen
    mixed = product(lora_A.astype(dtype), materialize(weight, dtype), 1).T  # W Aᵀ: [out, r]
    gram = product(lora_A, lora_A, 1)  # A Aᵀ: [r, r]
    return jnp.sum(lora_B * (2 * scale * mixed + scale**2 * product(lora_B, gram, 1)), axis=1)


@jax.jit
def _row_squares(weight: Any, place: tuple[Any, ...]) -> jax.Array:
    one = jax.tree.map(lambda value: value[place], weight)
    return jnp.sum(materialize(one, jnp.float32) ** 2, axis=1)


@dataclasses.dataclass(frozen=True)
class Dora(Lora):
    """DoRA, with the settings of LoRA."""

    name: ClassVar[str] = "dora"

    def adapter(self, linear: Projection, settings: tuple[Factor | None, ...]) -> DoraAdapter:
        """Builds the abstract factors and magnitudes."""
        return DoraAdapter(linear, settings, self.dropout)

    def peft_config(self, definition: Definition, settings: Mapping[str, Factor]) -> dict[str, Any]:
        """Returns LoRA's config with ``use_dora`` set."""
        return super().peft_config(definition, settings) | {"use_dora": True}

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Computes the row norms of the base, from which the magnitudes start.

        Layers and experts are processed one at a time, since each is dequantized to float32.
        """
        base, trees = dict(flatten(weights)), super().complete(definition, weights, trees, start)
        trainable, constants = (dict(flatten(tree)) for tree in trees)
        for path, _, adapter in adapters(definition):
            declared = definition.leaves[(*path, "weight")].declaration
            stack = declared.stack_shape
            squares = jnp.stack(
                [
                    _row_squares(base[(*path, "weight")], np.unravel_index(part, stack))
                    if chosen
                    else jnp.zeros(declared.shape[0])
                    for part, chosen in enumerate(adapter.chosen)
                ]
            ).reshape(*stack, -1)
            constants[(*path, "adapter", "squares")] = squares
            if start is not None:
                trainable[(*path, "adapter", "lora_magnitude_vector")] = jnp.sqrt(squares)
        return unflatten(trainable), unflatten(constants)


def from_config(section: AdapterConfig) -> Dora:
    """Returns the method that the ``adapter`` section of a config describes."""
    return Dora(**settings_from_config(section))


def from_peft(stored: StoredAdapter) -> Dora:
    """Returns the method and settings of a LoRA adapter with magnitudes.

    Raises:
      JaxtuneError: see `read_settings`.
    """
    return Dora(**read_settings(stored))
