"""Modules that are trained in full and stored with an adapter: PEFT's modules_to_save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.targets import UNTIE
from jaxtune.errors import JaxtuneError, closest
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Declaration, Path, declaration_of, layer_names, variables
from jaxtune.models.definition import Definition

# PEFT stores both in full if the vocabulary was resized, without listing them in modules_to_save.
_EMBEDDINGS = {
    "embed_tokens": "base_model.model.model.embed_tokens.weight",
    "lm_head": "base_model.model.lm_head.weight",
}

# A buffer that PEFT stores with a router; it is not trained.
_BUFFER = "e_score_correction_bias"


def saved_modules(stored: StoredAdapter) -> tuple[str, ...]:
    """Returns the modules that an adapter on disk stores in full.

    Raises:
      JaxtuneError: the setting is not a list of names.
    """
    saved = stored.config.get("modules_to_save") or []
    if not isinstance(saved, (list, tuple)) or not all(isinstance(name, str) for name in saved):
        raise JaxtuneError(
            f'adapter_config.json: "modules_to_save"={saved!r} is not a list of module names'
        )
    whole = (name for name, key in _EMBEDDINGS.items() if key in stored.tensors)
    return tuple(saved) + tuple(name for name in whole if not is_saved(name, saved))


def whole_weights(stored: StoredAdapter) -> tuple[str, Any] | None:
    """Returns the setting of an adapter on disk that adds whole weights, and its value, or None."""
    saved, tokens = saved_modules(stored), stored.config.get("trainable_token_indices")
    if saved:
        return "modules_to_save", list(saved)
    return ("trainable_token_indices", tokens) if tokens else None


def is_whole(name: str, saved: Sequence[str]) -> bool:
    """Returns whether a tensor, by its name after PEFT's prefix, belongs to a saved module."""
    module, _, kind = name.rpartition(".")
    # In PEFT's models fused experts are parameters of the experts module, without a ".weight".
    part = kind in ("weight", "bias", _BUFFER) or module.endswith(".experts")
    return part and not module.endswith((".lora_A", ".lora_B")) and is_saved(module, saved)


def is_saved(module: str, saved: Sequence[str]) -> bool:
    """Returns whether the path of a module, or of one that contains it, ends with one of `saved`.

    This is PEFT's rule.

    Args:
      module: full path of the module.
      saved: suffixes of module names.
    """
    parts = module.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(path.endswith(tuple(saved)) for path in paths)


def check_saved(model: CausalLM, saved: Sequence[str], key: str) -> None:
    """Checks the modules that are to be trained in full.

    Args:
      model: an abstract model.
      saved: suffixes of the modules' names.
      key: name of the setting, for messages.

    Raises:
      JaxtuneError: a module is missing, belongs to a single layer, is both embedding and head, or
        contains routed experts.
    """
    found = list(variables(model))
    modules = {path[:-1] for path, _ in found}
    routed = {path[:-1] for path, variable in found if declaration_of(variable).experts}
    for name in saved:
        if any(part.isdigit() for part in name.split(".")):
            raise JaxtuneError(f"{key}: {name} names one layer; modules are saved in all layers")
        if model.lm_head is None and name.split(".")[-1] in _EMBEDDINGS:
            raise JaxtuneError(
                f"{key}: {name} is both embedding and head in this model "
                f"(tie_word_embeddings): {UNTIE}"
            )
        if not any(is_saved(".".join(path), [name]) for path in modules):
            known = sorted({path[-1] for path in modules})
            raise JaxtuneError(f'{key}: "{name}" matches no module{closest(name, known)}')
        inside = [path for path in routed if is_saved(".".join(path[:-1]), [name])]
        if inside:
            raise JaxtuneError(
                f"{key}: {name} contains routed experts, which PEFT stores fused; they cannot be "
                "trained as part of a module: name the other modules in it"
            )


def read_saved(definition: Definition, stored: StoredAdapter, prefix: str) -> dict[str, np.ndarray]:
    """Returns the tensors of an adapter's saved modules, of any shape, by Hugging Face name.

    Raises:
      JaxtuneError: a tensor is missing, has another shape or belongs to no module of the model.
    """
    found: dict[str, np.ndarray] = {}
    for _, names, declared in saved_arrays(definition):
        for name in names:
            value = stored.tensors.get(prefix + name)
            if value is None:
                raise JaxtuneError(f'adapter_model.safetensors: lacks "{prefix}{name}"')
            if value.shape != declared.shape:
                raise JaxtuneError(_other_shape(name, value.shape, declared.shape))
            found[name] = value
    saved = saved_modules(stored)
    for key in stored.tensors:
        whole = is_whole(key.removeprefix(prefix), saved) and not key.endswith(_BUFFER)
        if whole and key.removeprefix(prefix) not in found:
            raise JaxtuneError(f'adapter_model.safetensors: "{key}" has no place in the model')
    return found


def _other_shape(name: str, shape: Sequence[int], needed: Sequence[int]) -> str:
    module = name.removesuffix(".weight").rpartition(".")[-1]
    if module in _EMBEDDINGS and shape[1:] == needed[1:]:
        return (
            f"adapter_model.safetensors: {module} has {shape[0]} rows, but {needed[0]} in the "
            "base: the adapter was trained after the vocabulary was resized; resize that "
            f"of the base as well (model.resize_token_embeddings({shape[0]}) and save_pretrained "
            "of transformers)"
        )
    return (
        f"adapter_model.safetensors: {name} has shape {list(shape)}, the model needs {list(needed)}"
    )


def saved_arrays(definition: Definition) -> Iterator[tuple[Path, list[str], Declaration]]:
    """Yields the path, checkpoint names and declaration of each trained array of the base."""
    for path, leaf in definition.of_kind("trainable").items():
        if leaf.in_checkpoint:
            yield path, layer_names(path, leaf.declaration), leaf.declaration
