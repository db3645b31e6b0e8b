"""Modules trained as they are and stored whole beside an adapter: PEFT's modules_to_save."""

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

# PEFT stores both whole where the vocabulary is not that of the base, without saying so.
_EMBEDDINGS = {
    "embed_tokens": "base_model.model.model.embed_tokens.weight",
    "lm_head": "base_model.model.lm_head.weight",
}

# PEFT stores a router's buffer with it, which is not trained.
_BUFFER = "e_score_correction_bias"


def saved_modules(stored: StoredAdapter) -> tuple[str, ...]:
    """Returns the modules that an adapter on disk stores whole.

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
    """Returns the setting of an adapter on disk that stands for whole weights, and its value."""
    saved, tokens = saved_modules(stored), stored.config.get("trainable_token_indices")
    if saved:
        return "modules_to_save", list(saved)
    return ("trainable_token_indices", tokens) if tokens else None


def is_whole(name: str, saved: Sequence[str]) -> bool:
    """Returns whether a tensor, by its name behind PEFT's prefix, is part of a saved module."""
    module, _, kind = name.rpartition(".")
    # PEFT's experts are parameters of their module.
    part = kind in ("weight", "bias", _BUFFER) or module.endswith(".experts")
    return part and not module.endswith((".lora_A", ".lora_B")) and is_saved(module, saved)


def is_saved(module: str, saved: Sequence[str]) -> bool:
    """Returns whether a module, or one around it, ends as one of `saved` does, as PEFT compares.

    Args:
      module: its whole path.
      saved: ends of names.
    """
    parts = module.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return any(path.endswith(tuple(saved)) for path in paths)


def check_saved(model: CausalLM, saved: Sequence[str], key: str) -> None:
    """Looks the modules to train whole up.

    Args:
      model: abstract.
      saved: ends of the modules' names.
      key: of the setting that has them, for messages.

    Raises:
      JaxtuneError: one is not there, is of one layer, is embedding and head at once, or has routed
        experts.
    """
    found = list(variables(model))
    modules = {path[:-1] for path, _ in found}
    routed = {path[:-1] for path, variable in found if declaration_of(variable).experts}
    for name in saved:
        if any(part.isdigit() for part in name.split(".")):
            raise JaxtuneError(f"{key}: {name} is of one layer; what is saved is saved of all")
        if model.lm_head is None and name.split(".")[-1] in _EMBEDDINGS:
            raise JaxtuneError(
                f"{key}: {name} is embedding and head at once in this model "
                f"(tie_word_embeddings): {UNTIE}"
            )
        if not any(is_saved(".".join(path), [name]) for path in modules):
            known = sorted({path[-1] for path in modules})
            raise JaxtuneError(f'{key}: "{name}" matches no module{closest(name, known)}')
        inside = [path for path in routed if is_saved(".".join(path[:-1]), [name])]
        if inside:
            raise JaxtuneError(
                f"{key}: {name} contains routed experts, which PEFT stores as one; they are not "
                "read or trained as part of a module: name the other modules in it"
            )


def read_saved(
    definition: Definition, stored: StoredAdapter, prefix: str
) -> dict[Path, np.ndarray]:
    """Returns the modules of an adapter on disk that are stored whole, float32, by path.

    Raises:
      JaxtuneError: a tensor is missing, of another shape or of no module of the model.
    """
    found: dict[Path, np.ndarray] = {}
    needed: set[str] = set()
    for path, names, declared in saved_arrays(definition):
        for name in names:
            value = stored.tensors.get(prefix + name)
            if value is None:
                raise JaxtuneError(f'adapter_model.safetensors: lacks "{prefix}{name}"')
            if value.shape != declared.shape:
                raise JaxtuneError(_other_shape(name, value.shape, declared.shape))
        values = [stored.tensors[prefix + name].astype(np.float32) for name in names]
        found[path] = np.stack(values).reshape(declared.stacked_shape)
        needed |= {prefix + name for name in names}
    saved = saved_modules(stored)
    for key in stored.tensors:
        whole = is_whole(key.removeprefix(prefix), saved) and not key.endswith(_BUFFER)
        if whole and key not in needed:
            raise JaxtuneError(f'adapter_model.safetensors: "{key}" has no place in the model')
    return found


def _other_shape(name: str, shape: Sequence[int], needed: Sequence[int]) -> str:
    module = name.removesuffix(".weight").rpartition(".")[-1]
    if module in _EMBEDDINGS and shape[1:] == needed[1:]:
        return (
            f"adapter_model.safetensors: {module} has {shape[0]} rows and that of the base "
            f"{needed[0]}: the adapter was trained after the vocabulary was resized; resize that "
            f"of the base as well (model.resize_token_embeddings({shape[0]}) and save_pretrained "
            "of transformers)"
        )
    return (
        f"adapter_model.safetensors: {name} has shape {list(shape)}, the model needs {list(needed)}"
    )


def saved_arrays(definition: Definition) -> Iterator[tuple[Path, list[str], Declaration]]:
    """Yields what is trained of the base: path, names in the checkpoint, declaration."""
    for path, leaf in definition.of_kind("trainable").items():
        if leaf.in_checkpoint:
            yield path, layer_names(path, leaf.declaration), leaf.declaration
