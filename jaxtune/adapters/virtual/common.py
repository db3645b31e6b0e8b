"""What the methods that add virtual tokens or modules have in common: starts, files and checks."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.method import StoredAdapter
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import Path, Tree, unflatten
from jaxtune.models.definition import Definition

# The key of virtual tokens, [n, …], in PEFT's files.
EMBEDDINGS = "prompt_embeddings"
WEIGHTS_FILE = "adapter_model.safetensors"
ENCODER_FILE = "encoder.safetensors"


def draw(definition: Definition, seed: int, std: float) -> Tree:
    """Draws the start of everything a method trains.

    Embeddings are normal; other weights are uniform within ±1/√fan-in, and so are their biases.

    Args:
      definition: of the model with the method attached.
      seed: of the draws; each array's are its own.
      std: standard deviation of embeddings.
    """
    leaves = definition.of_kind("trainable")

    def one(path: Path, shape: tuple[int, ...]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
        if path[-1] == "embedding":
            return jax.random.normal(key, shape, jnp.float32) * std
        # A bias has the fan-in of its weight, and everything in an LSTM that of its recurrence.
        sibling = path[-1].replace("bias", "weight").replace("_ih_", "_hh_")
        fan_in = leaves[(*path[:-1], sibling)].declaration.shape[-1]
        return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)

    return unflatten({p: one(p, leaf.declaration.stacked_shape) for p, leaf in leaves.items()})


def checked(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], file: str
) -> np.ndarray:
    """Returns a tensor of an adapter's file in float32.

    Raises:
      JaxtuneError: it is absent, has another shape or is not of floating point.
    """
    if name not in tensors:
        raise JaxtuneError(f'{file}: "{name}" is missing')
    value = tensors[name]
    if value.shape != shape:
        raise JaxtuneError(
            f'{file}: "{name}" has shape {list(value.shape)}, the model needs {list(shape)}'
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise JaxtuneError(f'{file}: "{name}" is {value.dtype}, not floating point')
    return value.astype(np.float32)


def count(stored: StoredAdapter, key: str) -> int:
    """Returns a positive whole number of adapter_config.json.

    Raises:
      JaxtuneError: it is none.
    """
    value = stored.config.get(key)
    if type(value) is not int or value < 1:
        raise JaxtuneError(f'adapter_config.json: "{key}" has {value!r}, not a positive number')
    return value


def refuse_extras(stored: StoredAdapter) -> None:
    """Refuses an adapter that holds more than virtual tokens.

    Raises:
      JaxtuneError: a setting or a tensor that jaxtune would have to drop.
    """
    for key, plain in (("modules_to_save", None), ("num_transformer_submodules", 1)):
        if stored.config.get(key) not in (plain, None, []):
            value = stored.config[key]
            raise JaxtuneError(f'adapter_config.json: "{key}"={value!r} is not supported')
    for key in stored.tensors:
        if key != EMBEDDINGS:
            raise JaxtuneError(f'{WEIGHTS_FILE}: "{key}" is not an array of virtual tokens')


def check_match(stored: StoredAdapter, needed: Mapping[str, Any]) -> None:
    """Compares adapter_config.json with what the model needs of it.

    Raises:
      JaxtuneError: the adapter belongs to a model of other dimensions.
    """
    for key, value in needed.items():
        if stored.config.get(key) != value:
            raise JaxtuneError(
                f'adapter_config.json: "{key}" is {stored.config.get(key)!r}, '
                f"the model needs {value!r}"
            )


def prompt_config(definition: Definition, virtual_tokens: int) -> dict[str, Any]:
    """Returns what every adapter_config.json of virtual tokens says."""
    return {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": definition.config.get("_name_or_path"),
        "num_virtual_tokens": virtual_tokens,
        "num_transformer_submodules": 1,
        "num_layers": definition.layer_count,
        "num_attention_heads": definition.config.get("num_attention_heads"),
        "modules_to_save": None,
        "inference_mode": True,
    }
