"""BitFit: trains biases only.

Source: Ben Zaken et al., 2022.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtune.adapters.method import Start, StoredAdapter
from jaxtune.adapters.projections.modules_to_save import saved_modules
from jaxtune.adapters.projections.peft_files import PREFIX, edit_tensors, from_disk, peft_config
from jaxtune.adapters.projections.slots import (
    AdapterPart,
    LinearMethod,
    SlotAdapter,
    adapters,
    shared_settings,
)
from jaxtune.adapters.targets import in_layers
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.linear import Edit, Projection
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


class BiasAdapter(SlotAdapter):
    """The bias of a projection, stacked over the layers of its block."""

    def __init__(self, linear: Projection, settings: tuple[bool | None, ...]):
        declared = declaration_of(linear.weight)
        self.features, axes, experts = linear.out_features, declared.axes[:1], declared.experts
        self.bias = parameter((self.features,), axes, "zeros", Trainable, experts)
        self.chosen_here = parameter((), (), "ones", Constant, experts)
        self.settings = settings

    def parts(self, setting: bool) -> dict[str, AdapterPart]:
        """Returns the bias."""
        return {"bias": AdapterPart(".bias", (self.features,))}

    def start(self, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Returns zeros of the stacked shape; `complete` fills in the base's biases."""
        del name, key
        return jnp.zeros(shape)

    def constants(self) -> dict[str, np.ndarray]:
        """Returns [layers · experts]: 1 where the bias is used, 0 elsewhere."""
        return {"chosen_here": self.chosen}

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Replaces the base's bias [out] in the layers that are trained."""
        del weight, dtype
        here = self.chosen_here.get_value()[..., None] > 0
        return Edit(bias=jnp.where(here, self.bias.get_value(), 0.0 if bias is None else bias))

    def edits_bias(self, linear: Projection) -> bool:
        """Returns True: the bias is what the method edits."""
        del linear
        return True


@dataclasses.dataclass(frozen=True)
class BitFit(LinearMethod):
    """BitFit with its settings.

    Attributes:
      targets: modules that get a new bias if no projection of the model has one. In a model with
        biases all of them are trained and the targets are ignored.
      modules: Hugging Face module names, set for an adapter read from disk; replaces `targets`.
    """

    name: ClassVar[str] = "bitfit"

    targets: tuple[str, ...] = ("attention",)
    modules: tuple[str, ...] = ()

    def choose(self, modules: Mapping[str, Projection]) -> dict[str, bool]:
        """Returns the projections whose bias is trained."""
        if self.modules:
            return from_disk([(name, True) for name in self.modules], modules)
        biased = [name for name, linear in modules.items() if linear.frozen[1] is not None]
        chosen = in_layers(biased, self.layers) if biased else self.select(self.targets, modules)
        return dict.fromkeys(chosen, True)

    def adapter(self, linear: Projection, settings: tuple[bool | None, ...]) -> BiasAdapter:
        """Builds the abstract bias."""
        return BiasAdapter(linear, settings)

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Initialises from the biases of the base, if it has any."""
        trainable, base = dict(flatten(trees[0])), dict(flatten(weights))
        for path, _, _ in adapters(definition):
            if start is not None and (*path, "bias") in base:
                bias = base[(*path, "bias")].astype(jnp.float32)
                trainable[(*path, "adapter", "bias")] = jnp.copy(bias)
        return unflatten(trainable), trees[1]

    def peft_config(self, definition: Definition, settings: Mapping[str, bool]) -> dict[str, Any]:
        """Returns a config in jaxtune's own format, since PEFT does not have the method."""
        return peft_config("BITFIT", definition, settings)


def from_config(section: AdapterConfig) -> BitFit:
    """Returns the method that the ``adapter`` section of a config describes."""
    return BitFit(tuple(section.targets), **shared_settings(section))


def from_peft(stored: StoredAdapter) -> BitFit:
    """Returns the method and settings of an adapter written by jaxtune.

    Raises:
      JaxtuneError: an unsupported setting or tensor.
    """
    modules: list[str] = []
    for key, value in edit_tensors(stored, "a bias"):
        name, _, kind = key.rpartition(".")
        if kind != "bias" or value.ndim != 1:
            raise JaxtuneError(f'adapter_model.safetensors: "{PREFIX}{key}" is not a bias')
        modules.append(name)
    if not modules:
        raise JaxtuneError("adapter_model.safetensors holds no biases")
    saved = saved_modules(stored)
    return BitFit(modules=tuple(sorted(modules)), modules_to_save=saved, from_file=True)
