"""ESFT: full fine-tuning of the routed experts that are most relevant to the data.

Source: Wang et al., 2024 (Let the Expert Stick to His Last).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.esft.expert_scores import Choice, ExpertScores, parse_choice, read_choice
from jaxtune.adapters.method import Method, Start, StoredAdapter, owned
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
from jaxtune.quant import QuantizedWeight

PEFT_TYPE = "ESFT"


class ChosenExperts(nnx.Module):
    """The trained weights of some experts of a projection, stacked over the layers of a block.

    With K the largest number of trained experts in a layer, `weight` is [layers, K, out, in].
    Layers with fewer trained experts are padded with zeros; no token is routed to the padding.
    `slot`, [layers, E], maps each expert to its index along K, or to -1 where it stays frozen.
    """

    def __init__(self, linear: Projection, experts: tuple[tuple[int, ...], ...]):
        declared = declaration_of(linear.weight)
        most = max(len(chosen) for chosen in experts)
        # Sharded within each matrix: K is small and seldom divisible by the number of devices.
        self.weight = parameter((most, *declared.shape), (None, *declared.axes), kind=Trainable)
        self.slot = parameter((), (), kind=Constant, experts=declared.experts)
        self.experts = experts

    def replace(self, frozen: Any) -> Replaced:
        """Returns the frozen weights [E, out, in], plain or quantized, with trained ones overlaid.

        The two are not combined into one array: the grouped product picks from one or the other.
        """
        return Replaced(frozen, self.weight.get_value(), self.slot.get_value().astype(jnp.int32))

    @property
    def mask(self) -> list[bool]:
        """Whether each expert of each layer of the block is trained, in layer-major order."""
        experts = range(declaration_of(self.slot).experts or 0)
        return [expert in chosen for chosen in self.experts for expert in experts]

    def slots(self) -> np.ndarray:
        """Returns float32 [layers, E]: the index of each expert's trained weight, or -1."""
        values = np.full(declaration_of(self.slot).stacked_shape, -1, np.float32)
        for layer, chosen in enumerate(self.experts):
            values[layer, list(chosen)] = range(len(chosen))
        return values


@dataclasses.dataclass(frozen=True)
class Esft(Method):
    """ESFT with its settings.

    Attributes:
      experts: experts to train, by layer; empty until they have been scored.
      score: score that selects experts: "token" or "gate".
      threshold: sum of scores that the selected experts of a layer have to reach.
    """

    name: ClassVar[str] = "esft"

    experts: Choice = ()
    score: str = "token"
    threshold: float = 0.2

    def with_scores(self, measure: Callable[[], ExpertScores]) -> Esft:
        """Returns a copy whose experts are selected by score, unless they are already set."""
        if self.experts:
            return self
        return dataclasses.replace(self, experts=measure().choose(self.score, self.threshold))

    def attach(self, model: CausalLM) -> None:
        """Fills the slots of the projections of chosen experts.

        Raises:
          JaxtuneError: no experts are chosen, or the model lacks one of them.
        """
        if not self.experts:
            raise JaxtuneError(
                "adapter.expert_scores is empty: adapter.method=esft needs a file of expert "
                "scores; write it with jaxtune experts score"
            )
        wanted, found = dict(self.experts), set()
        for linear in model.projections().values():
            declared = declaration_of(linear.weight)
            if linear.experts is None or declared.layers is None:
                continue
            # One tuple per layer of the block; layers without a choice stay frozen.
            first, count = declared.layers
            chosen = tuple(wanted.get(layer, ()) for layer in range(first, first + count))
            found |= set(range(first, first + count))
            if not any(chosen):
                continue
            for layer, experts in enumerate(chosen, first):
                if experts and not 0 <= experts[0] <= experts[-1] < (declared.experts or 0):
                    raise JaxtuneError(
                        f"adapter.expert_scores: layer {layer} has {declared.experts} experts, "
                        f"but no expert {experts[0] if experts[0] < 0 else experts[-1]}"
                    )
            linear.chosen = stack(ChosenExperts(linear, chosen), *declared.layers)
        for layer in sorted(wanted.keys() - found):
            raise JaxtuneError(f"adapter.expert_scores: layer {layer} has no routed experts")

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Returns no trainable arrays, which `complete` fills, and the slots as constants."""
        del seed
        slots = {
            (*path, "slot"): jnp.asarray(chosen.slots()) for path, _, chosen in _each(definition)
        }
        return {}, unflatten(slots)

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Initialises trained experts from the frozen weights, dequantized if necessary."""
        if start is None:
            return trees
        base, trainable = dict(flatten(weights)), {}
        for path, _, chosen in _each(definition):
            frozen = base[(*path[:-1], "weight")]
            trainable[(*path, "weight")] = _gather(frozen, *_indices(chosen))
        return unflatten(trainable), trees[1]

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns ESFT's config and the weights of the chosen experts, each [out, in], by name."""
        del constants
        values, tensors = dict(flatten(trainable)), {}
        for path, names, _ in _each(definition):
            value = np.asarray(values[(*path, "weight")], np.float32)
            tensors |= {f"{name}.weight": owned(value[place]) for place, name in names.items()}
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
        """Stacks the stored weights of the chosen experts."""
        whole, trainable = self.whole_weights(definition, stored), {}
        for path, names, _ in _each(definition):
            declared = definition.leaves[(*path, "weight")].declaration
            packed = np.zeros(declared.stacked_shape, np.float32)
            for place, name in names.items():
                packed[place] = whole[f"{name}.weight"].astype(np.float32)
            trainable[(*path, "weight")] = jnp.asarray(packed)
        return unflatten(trainable), self.init(definition, 0)[1]

    def whole_weights(
        self, definition: Definition, stored: StoredAdapter
    ) -> Mapping[str, np.ndarray]:
        """Returns the stored weights of the chosen experts, each [out, in], by name.

        Raises:
          JaxtuneError: a weight is missing, has another shape or belongs to no chosen expert.
        """
        found: dict[str, np.ndarray] = {}
        for path, names, _ in _each(definition):
            shape = definition.leaves[(*path, "weight")].declaration.shape[1:]
            for key in (f"{name}.weight" for name in names.values()):
                if key not in stored.tensors:
                    raise JaxtuneError(f'adapter_model.safetensors: lacks "{key}"')
                found[key] = stored.tensors[key]
                if found[key].shape != shape:
                    raise JaxtuneError(
                        f'adapter_model.safetensors: "{key}" has shape {list(found[key].shape)}, '
                        f"the model needs {list(shape)}"
                    )
        for key in sorted(stored.tensors.keys() - found.keys()):
            raise JaxtuneError(
                f'adapter_model.safetensors: "{key}" is not a weight of a chosen expert'
            )
        return found


def _each(
    definition: Definition,
) -> Iterator[tuple[Path, dict[tuple[int, int], str], ChosenExperts]]:
    """Yields the path of each slot, module names by (layer, index along K), and the module."""
    for path, linear in definition.projections().items():
        if linear.chosen is not None:
            names, chosen = module_names(path, linear), linear.chosen
            per_layer = len(names) // len(chosen.experts)
            yield (
                (*path, "chosen"),
                {
                    (layer, slot): names[layer * per_layer + expert]
                    for layer, experts in enumerate(chosen.experts)
                    for slot, expert in enumerate(experts)
                },
                chosen,
            )


def _indices(chosen: ChosenExperts) -> tuple[np.ndarray, np.ndarray]:
    """Returns int32 [layers, K], the experts, and bool [layers, K], False for padding."""
    layers, most = declaration_of(chosen.weight).stacked_shape[:2]
    experts, real = np.zeros((layers, most), np.int32), np.zeros((layers, most), bool)
    for layer, here in enumerate(chosen.experts):
        experts[layer, : len(here)], real[layer, : len(here)] = here, True
    return experts, real


@jax.jit
def _gather(frozen: Any, experts: jax.Array, real: jax.Array) -> jax.Array:
    """Gathers float32 [L, K, out, in] from a stack [L, E, out, in]; zeros where `real` is False.

    The index arrays [L, 1] and [L, K] select the same experts from every part of a quantized
    weight (codes, scales), so that only the gathered experts are dequantized.
    """
    layers = jnp.arange(experts.shape[0])[:, None]
    taken = jax.tree.map(lambda part: pick(part, lambda p: p[layers, experts]), frozen)
    plain = taken.dequantize(jnp.float32) if isinstance(taken, QuantizedWeight) else taken
    return jnp.where(real[..., None, None], plain.astype(jnp.float32), 0.0)


def from_config(section: AdapterConfig) -> Esft:
    """Returns the method that the ``adapter`` section of a config describes.

    Raises:
      JaxtuneError: the file of scores is missing or invalid.
    """
    kind, threshold = section.expert_score, section.expert_threshold
    path = section.expert_scores
    return Esft(read_choice(path, kind, threshold) if path else (), kind, threshold)


def from_peft(stored: StoredAdapter) -> Esft:
    """Returns the method and experts of an adapter written by jaxtune or ESFT's own program.

    Raises:
      JaxtuneError: an unsupported setting, or no experts.
    """
    experts = parse_choice(stored.config, "adapter_config.json")
    if not experts:
        raise JaxtuneError('adapter_config.json: "experts" is empty')
    return Esft(experts)
