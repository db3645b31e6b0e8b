"""ESFT: whole weights of the routed experts that the data calls on, and nothing else, are trained.

Source: Wang et al., 2024 (Let the Expert Stick to His Last).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.esft.expert_scores import Choice, ExpertScores, parse_choice, read_choice
from jaxtune.adapters.method import Method, Start, StoredAdapter
from jaxtune.adapters.targets import module_names
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.cpu_bfloat16 import pick
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.experts.grouped import Replaced
from jaxtune.layers.linear import Projection
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
from jaxtune.quant import QuantizedWeight, materialize

PEFT_TYPE = "ESFT"


class ChosenExperts(nnx.Module):
    """The trained weights of some experts of a projection, in every layer of its blocks.

    Layers with fewer experts than others are padded with zeros, which no row meets.
    """

    def __init__(self, linear: Projection, experts: tuple[tuple[int, ...], ...]):
        declared = declaration_of(linear.weight)
        most = max(len(chosen) for chosen in experts)
        # Spread over devices within each matrix: so few experts seldom divide evenly.
        self.weight = parameter((most, *declared.shape), (None, *declared.axes), kind=Trainable)
        self.slot = parameter((), (), kind=Constant, experts=declared.experts)
        self.experts = experts

    def replace(self, frozen: Any) -> Replaced:
        """Puts the trained weights in the place of frozen ones [E, out, in], plain or quantized."""
        return Replaced(frozen, self.weight.get_value(), self.slot.get_value().astype(jnp.int32))

    def merged(self, frozen: Any, place: tuple[Any, ...]) -> jax.Array:
        """Returns the weight [out, in] of a (layer, expert) of the blocks, as it is now."""
        layer, expert = (int(index) for index in place)
        chosen = self.experts[layer]
        if expert in chosen:
            return self.weight.get_value()[layer, chosen.index(expert)]
        return materialize(jax.tree.map(lambda part: part[place], frozen), jnp.float32)

    @property
    def mask(self) -> list[bool]:
        """Whether an expert is trained, of each layer and expert of the blocks."""
        each = range(declaration_of(self.slot).experts or 0)
        return [expert in chosen for chosen in self.experts for expert in each]

    def slots(self) -> np.ndarray:
        """Returns float32 [layers, E]: where an expert's trained weight is; -1 for nowhere."""
        values = np.full(declaration_of(self.slot).stacked_shape, -1, np.float32)
        for layer, chosen in enumerate(self.experts):
            values[layer, list(chosen)] = range(len(chosen))
        return values


@dataclasses.dataclass(frozen=True)
class Esft(Method):
    """ESFT with its settings.

    Attributes:
      experts: by layer, those to train; empty until they have been scored.
      score: what chooses them: "token" or "gate".
      threshold: the fewest experts are chosen whose scores sum to this, in each layer.
    """

    name: ClassVar[str] = "esft"

    experts: Choice = ()
    score: str = "token"
    threshold: float = 0.2

    def with_scores(self, measure: Callable[[], ExpertScores]) -> Esft:
        """Chooses experts by their scores, unless they are known."""
        if self.experts:
            return self
        return dataclasses.replace(self, experts=measure().choose(self.score, self.threshold))

    def attach(self, model: CausalLM) -> None:
        """Fills the slots of the projections of chosen experts.

        Raises:
          JaxtuneError: no experts are chosen, or one that the model lacks.
        """
        if not self.experts:
            raise JaxtuneError(
                "adapter.expert_scores is empty: adapter.method=esft needs to know which experts "
                "to train; write the file with jaxtune experts score"
            )
        wanted, found = dict(self.experts), set()
        for linear in model.projections().values():
            declared = declaration_of(linear.weight)
            if linear.experts is None or declared.layers is None:
                continue
            first, count = declared.layers
            chosen = tuple(wanted.get(layer, ()) for layer in range(first, first + count))
            found |= set(range(first, first + count))
            if not any(chosen):
                continue
            for layer, experts in enumerate(chosen, first):
                if experts and not 0 <= experts[0] <= experts[-1] < (declared.experts or 0):
                    raise JaxtuneError(
                        f"adapter.expert_scores: layer {layer} has {declared.experts} experts, "
                        f"and no expert {experts[0] if experts[0] < 0 else experts[-1]}"
                    )
            linear.chosen = stack(ChosenExperts(linear, chosen), *declared.layers)
        for layer in sorted(wanted.keys() - found):
            raise JaxtuneError(f"adapter.expert_scores: layer {layer} has no routed experts")

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Leaves the weights to `complete`, and says which experts they are of."""
        del seed
        slots = {
            (*path, "slot"): jnp.asarray(chosen.slots()) for path, _, chosen in _each(definition)
        }
        return {}, unflatten(slots)

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Starts at the frozen weights, dequantized where they are quantized."""
        if start is None:
            return trees
        base, trainable = dict(flatten(weights)), {}
        for path, _, chosen in _each(definition):
            frozen = base[(*path[:-1], "weight")]
            trainable[(*path, "weight")] = _gather(frozen, *_indices(chosen))
        return unflatten(trainable), trees[1]

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns ESFT's config and the weights of chosen experts under their names."""
        del constants
        values, tensors = dict(flatten(trainable)), {}
        for path, names, _ in _each(definition):
            value = np.asarray(values[(*path, "weight")], np.float32)
            tensors |= {f"{name}.weight": value[place].copy() for place, name in names.items()}
        return StoredAdapter(
            {
                "peft_type": PEFT_TYPE,
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": definition.config.get("_name_or_path"),
                "inference_mode": True,
                "experts": {str(layer): list(experts) for layer, experts in self.experts},
                "shared_experts": False,
                "non_expert_modules": False,
            },
            tensors,
        )

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Packs the weights of chosen experts.

        Raises:
          JaxtuneError: one is missing, of another shape or has no place.
        """
        trainable, needed = {}, set()
        for path, names, _ in _each(definition):
            declared = definition.leaves[(*path, "weight")].declaration
            packed = np.zeros(declared.stacked_shape, np.float32)
            for place, name in names.items():
                key = f"{name}.weight"
                needed.add(key)
                if key not in stored.tensors:
                    raise JaxtuneError(f'adapter_model.safetensors: lacks "{key}"')
                value = stored.tensors[key]
                if value.shape != declared.shape[1:]:
                    raise JaxtuneError(
                        f'adapter_model.safetensors: "{key}" has shape {list(value.shape)}, the '
                        f"model needs {list(declared.shape[1:])}"
                    )
                packed[place] = value.astype(np.float32)
            trainable[(*path, "weight")] = jnp.asarray(packed)
        for key in sorted(stored.tensors.keys() - needed):
            raise JaxtuneError(
                f'adapter_model.safetensors: "{key}" is not a weight of a chosen expert'
            )
        return unflatten(trainable), self.init(definition, 0)[1]


def _each(
    definition: Definition,
) -> Iterator[tuple[Path, dict[tuple[int, int], str], ChosenExperts]]:
    """Yields each slot's path, its module names by (layer, slot) in the blocks, and its module."""
    for path, linear in definition.projections().items():
        if linear.chosen is not None:
            names, chosen = module_names(path, linear), linear.chosen
            each = len(names) // len(chosen.experts)
            yield (
                (*path, "chosen"),
                {
                    (layer, slot): names[layer * each + expert]
                    for layer, experts in enumerate(chosen.experts)
                    for slot, expert in enumerate(experts)
                },
                chosen,
            )


def _indices(chosen: ChosenExperts) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 [layers, K], the expert of each slot, and whether there is one."""
    layers, most = declaration_of(chosen.weight).stacked_shape[:2]
    experts, real = np.zeros((layers, most), np.int32), np.zeros((layers, most), bool)
    for layer, here in enumerate(chosen.experts):
        experts[layer, : len(here)], real[layer, : len(here)] = here, True
    return experts, real


@jax.jit
def _gather(frozen: Any, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Takes float32 [L, K, out, in] out of a stack [L, E, out, in]; zeros where nothing is real."""
    layers = jnp.arange(experts.shape[0])[:, None]

    taken = jax.tree.map(lambda part: pick(part, lambda p: p[layers, experts]), frozen)
    plain = taken.dequantize(jnp.float32) if isinstance(taken, QuantizedWeight) else taken
    return jnp.where(real[..., None, None], plain.astype(jnp.float32), 0.0)


def from_config(section: AdapterConfig) -> Esft:
    """Returns the method that the ``adapter`` section of a config describes.

    Raises:
      JaxtuneError: a file of scores that cannot be used.
    """
    kind, threshold = section.expert_score, section.expert_threshold
    path = section.expert_scores
    return Esft(read_choice(path, kind, threshold) if path else (), kind, threshold)


def from_peft(stored: StoredAdapter) -> Esft:
    """Returns the method, with its experts, of an adapter that jaxtune or ESFT's program wrote.

    Raises:
      JaxtuneError: a setting that jaxtune would have to drop, or no experts.
    """
    experts = parse_choice(stored.config, "adapter_config.json")
    if not experts:
        raise JaxtuneError('adapter_config.json: "experts" is empty')
    return Esft(experts)
