"""Biases of the base that are trained beside LoRA factors: PEFT's ``bias``.

PEFT keeps those of the projections that it edits under ``….base_layer.bias`` and the others, with
``bias="all"``, under their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.peft_files import PREFIX
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import declaration_of, layer_names, variables

CHOICES = ("none", "all", "lora_only")
END = ".bias"
_WRAPPED = ".base_layer.bias"
# With "all", PEFT stores the bias of a module that is saved whole twice more: under these, the one
# that is in use, and that of the base.
_REPEATED = (".modules_to_save.bias", ".original_module.bias")


def is_bias(name: str) -> bool:
    """Returns whether a weight's name, or a key of PEFT's, names a bias of the base."""
    return name.endswith(END)


def check(model: CausalLM, trains: Callable[[str], bool], key: str) -> bool:
    """Returns whether any bias of an abstract model is trained.

    Args:
      model: abstract.
      trains: says which are trained, by name.
      key: of the setting that asks for it, for messages.

    Raises:
      JaxtuneError: one is trained in some layers of its blocks and not in all of them.
    """
    found = False
    for path, variable in variables(model):
        names = layer_names(path, declaration_of(variable)) if path[-1] == "bias" else []
        trained = [name for name in names if trains(name)]
        if trained and len(trained) < len(names):
            other = next(name for name in names if name not in trained)
            raise JaxtuneError(
                f"{key}=lora_only: {trained[0]} is trained and {other} is not, which is not "
                "supported: biases are trained in all layers that are alike, or in none of them"
            )
        found = found or bool(trained)
    return found


def wrapped(stored: StoredAdapter, modules: Collection[str]) -> StoredAdapter:
    """Names the biases of edited modules as PEFT does."""

    def key(name: str) -> str:
        module = name.removeprefix(PREFIX).removesuffix(END)
        edited = is_bias(name) and module in modules
        return f"{PREFIX}{module}{_WRAPPED}" if edited else name

    return stored._replace(tensors={key(name): value for name, value in stored.tensors.items()})


def unwrapped(stored: StoredAdapter) -> StoredAdapter:
    """Names all biases as the checkpoint does, behind PEFT's prefix."""
    tensors = {
        f"{name.removesuffix(_WRAPPED)}{END}" if name.endswith(_WRAPPED) else name: value
        for name, value in stored.tensors.items()
        if not name.endswith(_REPEATED)
    }
    return stored._replace(tensors=tensors)


def check_known(stored: StoredAdapter, names: Collection[str]) -> None:
    """Raises a JaxtuneError for a bias in a file, as of `unwrapped`, that is not one of `names`."""
    for key in stored.tensors:
        if is_bias(key) and key.removeprefix(PREFIX) not in names:
            raise JaxtuneError(f'adapter_model.safetensors: the model has no trained "{key}"')


def setting(config: dict[str, Any]) -> str:
    """Reads ``bias`` of adapter_config.json."""
    value = str(config.get("bias") or "none")
    lookup(dict.fromkeys(CHOICES), value, 'adapter_config.json: "bias"')
    return value


def without(stored: StoredAdapter) -> dict[str, np.ndarray]:
    """Returns the tensors; biases [out] are left out where any are trained."""
    if setting(stored.config) == "none":
        return dict(stored.tensors)
    return {key: value for key, value in stored.tensors.items() if not is_bias(key)}
