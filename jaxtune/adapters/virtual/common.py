"""Common parts of methods that add virtual tokens or networks: initialisation, files, checks."""

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

# Key of the virtual tokens [n, …] in PEFT's files.
EMBEDDINGS = "prompt_embeddings"
WEIGHTS_FILE = "adapter_model.safetensors"
ENCODER_FILE = "encoder.safetensors"


def draw(definition: Definition, seed: int, std: float) -> Tree:
    """Draws the initial values of all trainable arrays of a method.

    Embeddings are normal; weights and biases are uniform within ±1/√fan-in, as in PyTorch.

    Args:
      definition: definition of the model with the method attached.
      seed: random seed, combined with the path of each array.
      std: standard deviation of embeddings.
    """
    leaves = definition.of_kind("trainable")

    def one(path: Path, shape: tuple[int, ...]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
        if path[-1] == "embedding":
            return jax.random.normal(key, shape, jnp.float32) * std
        # A bias has the fan-in of its weight; in an LSTM all arrays have that of weight_hh.
        sibling = path[-1].replace("bias", "weight").replace("_ih_", "_hh_")
        fan_in = leaves[(*path[:-1], sibling)].declaration.shape[-1]
        return jax.random.uniform(key, shape, jnp.float32, -(fan_in**-0.5), fan_in**-0.5)

    return unflatten({p: one(p, leaf.declaration.stacked_shape) for p, leaf in leaves.items()})


def checked(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], file: str
) -> np.ndarray:
    """Returns a tensor of an adapter's file in float32.

    Raises:
      JaxtuneError: the tensor is missing, has another shape or is not floating point.
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
    """Returns a positive integer of adapter_config.json.

    Raises:
      JaxtuneError: the value is missing or not a positive integer.
    """
    value = stored.config.get(key)
    if type(value) is not int or value < 1:
        raise JaxtuneError(f'adapter_config.json: "{key}" is {value!r}, not a positive integer')
    return value


def refuse_extras(stored: StoredAdapter) -> None:
    """Checks that an adapter holds nothing but virtual tokens.

    Raises:
      JaxtuneError: an unsupported setting or tensor.
    """
    for key, plain in (("modules_to_save", None), ("num_transformer_submodules", 1)):
        if stored.config.get(key) not in (plain, None, []):
            value = stored.config[key]
            raise JaxtuneError(f'adapter_config.json: "{key}"={value!r} is not supported')
    for key in stored.tensors:
        if key != EMBEDDINGS:
            raise JaxtuneError(f'{WEIGHTS_FILE}: "{key}" is not an array of virtual tokens')


def check_match(stored: StoredAdapter, needed: Mapping[str, Any]) -> None:
    """Checks settings of adapter_config.json against the model's.

    Raises:
      JaxtuneError: a setting differs, because the adapter belongs to another model.
    """
    for key, value in needed.items():
        if stored.config.get(key) != value:
            raise JaxtuneError(
                f'adapter_config.json: "{key}" is {stored.config.get(key)!r}, '
                f"the model needs {value!r}"
            )


def prompt_config(definition: Definition, virtual_tokens: int) -> dict[str, Any]:
    """Returns the entries of adapter_config.json that all methods of virtual tokens share."""
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
