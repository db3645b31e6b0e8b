"""(IA)³: trained scales of the outputs of some projections and of the inputs of others.

Source: Liu et al., 2022 (T-Few).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.modules_to_save import saved_modules
from jaxtune.adapters.projections.peft_files import PREFIX, edit_tensors, from_disk, peft_config
from jaxtune.adapters.projections.slots import (
    AdapterPart,
    LinearMethod,
    SlotAdapter,
    shared_settings,
)
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.linear import Edit, Projection
from jaxtune.layers.tree import Constant, Trainable, declaration_of, parameter
from jaxtune.models.definition import Definition

# The end of a projection that is scaled.
OUTPUTS, INPUTS = "outputs", "inputs"


class IA3Adapter(SlotAdapter):
    """The scale of a projection's outputs or inputs, stacked over the layers of its block."""

    def __init__(self, linear: Projection, settings: tuple[str | None, ...]):
        self.end = next(end for end in settings if end)
        declared = declaration_of(linear.weight)
        scales_outputs = self.end == OUTPUTS
        self.features = linear.out_features if scales_outputs else linear.in_features
        axes = declared.axes[:1] if scales_outputs else declared.axes[1:]
        experts = declared.experts
        self.ia3_l = parameter((self.features,), axes, "ones", Trainable, experts)
        self.chosen_here = parameter((), (), "ones", Constant, experts)
        self.settings = settings

    def parts(self, setting: str) -> dict[str, AdapterPart]:
        """Returns the scale; PEFT stores output scales as a column and input scales as a row."""
        in_file = (self.features, 1) if setting == OUTPUTS else (1, self.features)
        return {"ia3_l": AdapterPart(".ia3_l", (self.features,), in_file)}

    def start(self, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Returns ones of the stacked shape: the identity."""
        del name, key
        return jnp.ones(shape)

    def constants(self) -> dict[str, np.ndarray]:
        """Returns [layers · experts]: 1 where the scale is used, 0 elsewhere."""
        return {"chosen_here": self.chosen}

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Scales the inputs [in], or the outputs [out] with their bias."""
        del weight, dtype
        here = self.chosen_here.get_value()[..., None] > 0
        scale = jnp.where(here, self.ia3_l.get_value(), 1.0)
        if self.end == INPUTS:
            return Edit(in_scale=scale)
        return Edit(out_scale=scale, bias=None if bias is None else bias * scale)

    def edits_bias(self, linear: Projection) -> bool:
        """Returns whether the scaled outputs have a bias."""
        return self.end == OUTPUTS and linear.frozen[1] is not None


@dataclasses.dataclass(frozen=True)
class IA3(LinearMethod):
    """(IA)³ with its settings.

    Attributes:
      targets: modules whose outputs are scaled; see `match_targets`.
      feedforward: modules whose inputs are scaled.
      ends: "outputs" or "inputs" by Hugging Face module name, set for an adapter read from disk;
        replaces the two above.
    """

    name: ClassVar[str] = "ia3"

    targets: tuple[str, ...] = ("k_proj", "v_proj")
    feedforward: tuple[str, ...] = ("down_proj",)
    ends: tuple[tuple[str, str], ...] = ()

    def choose(self, modules: Mapping[str, Projection]) -> dict[str, str]:
        """Returns the end of each module that is scaled."""
        if self.ends:
            return from_disk(self.ends, modules)
        outputs = self.select(self.targets, modules)
        inputs = self.select(self.feedforward, modules, "adapter.feedforward")
        return dict.fromkeys(outputs, OUTPUTS) | dict.fromkeys(inputs, INPUTS)

    def adapter(self, linear: Projection, settings: tuple[str | None, ...]) -> IA3Adapter:
        """Builds the abstract scale.

        Raises:
          JaxtuneError: layers of one block are scaled at different ends.
        """
        if {OUTPUTS, INPUTS} <= set(settings):
            what = "scales the inputs of a projection in some layers and its outputs in others"
            if self.from_file:
                raise JaxtuneError(
                    f'adapter_config.json: "feedforward_modules": the adapter {what}, which is not '
                    "supported"
                )
            raise JaxtuneError(
                f"(IA)³ {what}; name it either in adapter.targets or in adapter.feedforward"
            )
        return IA3Adapter(linear, settings)

    def peft_config(self, definition: Definition, settings: Mapping[str, str]) -> dict[str, Any]:
        """Returns the config: the target modules and those scaled at their inputs."""
        config: dict[str, Any] = peft_config("IA3", definition, settings)
        config["init_ia3_weights"] = True
        inputs = {name for name, end in settings.items() if end == INPUTS}
        short, others = (
            {name.rsplit(".", 1)[-1] for name in group}
            for group in (inputs, settings.keys() - inputs)
        )
        # PEFT requires feedforward_modules to be a subset of target_modules, spelled equally.
        if short & others or not short <= set(config["target_modules"]):
            return config | {
                "target_modules": sorted(settings),
                "feedforward_modules": sorted(inputs),
            }
        return config | {"feedforward_modules": sorted(short)}


def from_config(section: AdapterConfig) -> IA3:
    """Returns the method that the ``adapter`` section of a config describes."""
    targets, feedforward = tuple(section.targets), tuple(section.feedforward)
    return IA3(targets, feedforward, **shared_settings(section))


def from_peft(stored: StoredAdapter) -> IA3:
    """Returns the method and settings of an adapter written by PEFT.

    Raises:
      JaxtuneError: an unsupported setting or tensor.
    """
    ends: dict[str, str] = {}
    for key, value in edit_tensors(stored, "a scale of (IA)³"):
        name, _, kind = key.rpartition(".")
        if kind != "ia3_l" or value.ndim != 2 or 1 not in value.shape:
            raise JaxtuneError(
                f'adapter_model.safetensors: "{PREFIX}{key}" is not a scale of (IA)³'
            )
        ends[name] = OUTPUTS if value.shape[1] == 1 else INPUTS
    if not ends:
        raise JaxtuneError("adapter_model.safetensors holds no scales of (IA)³")
    saved = saved_modules(stored)
    return IA3(ends=tuple(sorted(ends.items())), modules_to_save=saved, from_file=True)
