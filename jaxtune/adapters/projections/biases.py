"""Biases of the base that are trained together with LoRA factors: PEFT's ``bias`` setting.

PEFT stores the bias of an edited projection as ``….base_layer.bias`` and, with ``bias="all"``,
the other biases under their own names.
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
# With "all", PEFT stores the bias of a module in modules_to_save twice more: the trained one and
# the original, under these suffixes.
_REPEATED = (".modules_to_save.bias", ".original_module.bias")


def is_bias(name: str) -> bool:
    """Returns whether a weight's name, or a key of PEFT's, names a bias of the base."""
    return name.endswith(END)


def check(model: CausalLM, trains: Callable[[str], bool], key: str) -> bool:
    """Returns whether any bias of an abstract model is trained.

    Args:
      model: an abstract model.
      trains: returns whether the weight of a name is trained.
      key: name of the setting, for messages.

    Raises:
      JaxtuneError: a bias is trained in only some layers of a block.
    """
    found = False
    for path, variable in variables(model):
        names = layer_names(path, declaration_of(variable)) if path[-1] == "bias" else []
        trained = [name for name in names if trains(name)]
        if trained and len(trained) < len(names):
            other = next(name for name in names if name not in trained)
            raise JaxtuneError(
                f"{key}=lora_only: {trained[0]} would be trained and {other} not, which is not "
                "supported: layers of equal structure train the same biases"
            )
        found = found or bool(trained)
    return found


def wrapped(stored: StoredAdapter, modules: Collection[str]) -> StoredAdapter:
    """Renames the biases of edited modules to PEFT's keys."""

    def key(name: str) -> str:
        module = name.removeprefix(PREFIX).removesuffix(END)
        edited = is_bias(name) and module in modules
        return f"{PREFIX}{module}{_WRAPPED}" if edited else name

    return stored._replace(tensors={key(name): value for name, value in stored.tensors.items()})


def unwrapped(stored: StoredAdapter) -> StoredAdapter:
    """Renames PEFT's keys of biases to PEFT's prefix plus the checkpoint's name."""
    tensors = {
        f"{name.removesuffix(_WRAPPED)}{END}" if name.endswith(_WRAPPED) else name: value
        for name, value in stored.tensors.items()
        if not name.endswith(_REPEATED)
    }
    return stored._replace(tensors=tensors)


def check_known(stored: StoredAdapter, names: Collection[str]) -> None:
    """Raises a JaxtuneError if the result of `unwrapped` holds a bias that is not in `names`."""
    for key in stored.tensors:
        if is_bias(key) and key.removeprefix(PREFIX) not in names:
            raise JaxtuneError(f'adapter_model.safetensors: the model has no trained "{key}"')


def setting(config: dict[str, Any]) -> str:
    """Returns ``bias`` of adapter_config.json, one of `CHOICES`."""
    value = str(config.get("bias") or "none")
    lookup(dict.fromkeys(CHOICES), value, 'adapter_config.json: "bias"')
    return value


def without(stored: StoredAdapter) -> dict[str, np.ndarray]:
    """Returns the tensors of an adapter without its trained biases [out]."""
    if setting(stored.config) == "none":
        return dict(stored.tensors)
    return {key: value for key, value in stored.tensors.items() if not is_bias(key)}
