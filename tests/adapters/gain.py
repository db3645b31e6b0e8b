"""A method that is not part of jaxtune: scales each chosen projection by one trained number."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxtune.adapters.projections.peft_files import edit_tensors, peft_config
from jaxtune.adapters.projections.slots import AdapterPart, LinearMethod, SlotAdapter
from jaxtune.layers.linear import Edit
from jaxtune.layers.tree import Trainable, declaration_of, parameter


class GainAdapter(SlotAdapter):
    """W' = (1 + g) W, and the bias with it."""

    def __init__(self, linear, settings):
        self.settings, self.rows = settings, linear.out_features
        self.gain = parameter((), (), "zeros", Trainable, declaration_of(linear.weight).experts)

    def parts(self, setting):
        return {"gain": AdapterPart(".gain", (), (1,))}

    def start(self, name, shape, key):
        return jnp.zeros(shape)

    def constants(self):
        return {}

    def edit(self, weight, bias, dtype):
        gain = self.gain.get_value()  # a scalar, or one for each expert
        scale = jnp.broadcast_to(1 + gain[..., None], (*gain.shape, self.rows))
        return Edit(out_scale=scale, bias=None if bias is None else bias * scale)

    def edits_bias(self, linear):
        return linear.frozen[1] is not None


@dataclasses.dataclass(frozen=True)
class Gain(LinearMethod):
    """The method; `targets` as LoRA has them."""

    name: ClassVar[str] = "gain"
    targets: tuple[str, ...] = ("all-linear",)

    def choose(self, modules):
        return dict.fromkeys(self.select(self.targets, modules), True)

    def adapter(self, linear, settings):
        return GainAdapter(linear, settings)

    def peft_config(self, definition, settings):
        return peft_config("GAIN", definition, settings)


def from_config(section: Any) -> Gain:
    return Gain(targets=tuple(section.targets))


def from_peft(stored: Any) -> Gain:
    names = {key.rpartition(".")[0] for key, _ in edit_tensors(stored, "a gain")}
    return Gain(targets=tuple(sorted(names)))
