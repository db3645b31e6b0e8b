"""PEFT's config and tensors, for methods that edit projections."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.method import BASE_COPY, StoredAdapter
from jaxtune.adapters.projections.modules_to_save import is_whole, saved_modules
from jaxtune.adapters.targets import TIED_HEAD, module_names
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import Definition

PREFIX = "base_model.model."


def from_disk(edits: Iterable[tuple[str, Any]], names: Collection[str]) -> dict[str, Any]:
    """Returns the settings by module of an adapter on disk.

    Args:
      edits: (module, its settings) for each edited module.
      names: names of the model's projections.

    Raises:
      JaxtuneError: the adapter edits a module that the model lacks.
    """
    settings = dict(edits)
    for name in settings:
        if name == "lm_head" and name not in names:
            raise JaxtuneError(f"the adapter edits lm_head, and {TIED_HEAD}")
        if name not in names:
            raise JaxtuneError(f"the adapter edits {name}, which the model does not have")
    return settings


def target_modules(definition: Definition, names: Collection[str]) -> list[str]:
    """Returns ``target_modules``: last components if these select the same modules, else paths."""
    suffixes = {name.rsplit(".", 1)[-1] for name in names}
    projections = [n for p, m in definition.projections().items() for n in module_names(p, m)]
    by_suffix = {n for n in projections if n.rsplit(".", 1)[-1] in suffixes}
    return sorted(suffixes if by_suffix == set(names) else names)


def peft_config(kind: str, definition: Definition, names: Collection[str]) -> dict[str, Any]:
    """Returns the entries of adapter_config.json that all methods share."""
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": definition.config.get("_name_or_path"),
        "target_modules": target_modules(definition, names),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def edit_tensors(stored: StoredAdapter, what: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of edits, of any shape, by keys without PEFT's prefix.

    Leaves out saved modules and the copy of the base's head.

    Args:
      stored: an adapter on disk.
      what: description of the method's tensors for messages, such as "a bias".

    Raises:
      JaxtuneError: a key lacks PEFT's prefix, or a tensor is not floating point.
    """
    saved = saved_modules(stored)
    for key, value in stored.tensors.items():
        if key.endswith(BASE_COPY):
            continue  # compared with the base when that is loaded
        if not key.startswith(PREFIX) or not jnp.issubdtype(value.dtype, jnp.floating):
            raise JaxtuneError(f'adapter_model.safetensors: "{key}" is not {what}')
        name = key.removeprefix(PREFIX)
        if ".lora_embedding_" in name:
            raise JaxtuneError(
                f'adapter_model.safetensors: "{key}": an adapter that edits embed_tokens by LoRA '
                "is not supported; merge it with PEFT, or train embed_tokens in full "
                "(modules_to_save) or some of its tokens (trainable_token_indices)"
            )
        if not is_whole(name, saved):
            yield name, value
