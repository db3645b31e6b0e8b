"""Streaming a checkpoint into a tree of arrays, tensor by tensor."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.checkpoints.progress import track
from jaxtune.checkpoints.quantize import read_quantized
from jaxtune.checkpoints.source import TensorSource
from jaxtune.errors import JaxtuneError, closest
from jaxtune.layers.tree import Tree, layer_names, unflatten
from jaxtune.models.definition import Definition, Leaf, as_matrix
from jaxtune.parallel.mesh import named_sharding
from jaxtune.quant import QuantizedWeight

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def _ignored(name: str, config: Mapping[str, Any]) -> str | None:
    """Says why a checkpoint tensor is not needed, or returns None when it should be."""
    if name.endswith("rotary_emb.inv_freq"):
        return "computed from config.json"
    if name == "lm_head.weight" and config.get("tie_word_embeddings"):
        return "tied to the embedding"
    layer = _LAYER.match(name)
    if layer and int(layer[1]) >= config["num_hidden_layers"]:
        return "a multi-token-prediction layer, which fine-tuning does not use"
    return None


def check_names(definition: Definition, source: TensorSource) -> dict[str, str]:
    """Compares what the model needs with what the checkpoint has; returns what is ignored."""
    needed: dict[str, tuple[int, ...]] = {}
    for path, leaf in definition.in_checkpoint().items():
        for name in layer_names(path, leaf.declaration):
            needed[name] = leaf.declaration.shape
    present = set(source.names())
    ignored = {
        name: reason
        for name in sorted(present - set(needed))
        if (reason := _ignored(name, definition.config))
    }
    missing = sorted(set(needed) - present)
    extra = sorted(present - set(needed) - set(ignored))
    dtypes = [
        f"{name} is {source.dtype(name)} ({source.where(name)})"
        for name in sorted(needed)
        if name in present and not jnp.issubdtype(source.dtype(name), jnp.floating)
    ]
    shapes = [
        f"{name} is {list(source.shape(name))}, not {list(shape)} ({source.where(name)})"
        for name, shape in sorted(needed.items())
        if name in present and source.shape(name) != shape
    ]
    problems = [
        f"{len(names)} tensor(s) {what}: {_some(names)}{hint}"
        for what, names, hint in (
            ("missing", missing, closest(missing[0], extra) if missing else ""),
            ("not in the architecture", extra, ""),
            ("of the wrong shape", shapes, ""),
            ("of a dtype that is no weight's", dtypes, ""),
        )
        if names
    ]
    if problems:
        raise JaxtuneError(f"{source.path}: does not fit its config: " + "; ".join(problems))
    return ignored


def _some(names: list[str], most: int = 5) -> str:
    # A name is data from elsewhere: it shall not break the line, nor flood the terminal.
    shown = [n if n.isprintable() and len(n) < 400 else ascii(n[:100]) for n in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


@functools.partial(jax.jit, donate_argnums=0)
def _fill(stacked: jax.Array, value: jax.Array, place: jax.Array) -> jax.Array:
    """Puts a value where `place`, an index for each leading axis, says."""
    start = (*place, *(jnp.int32(0),) * value.ndim)
    value = value.astype(stacked.dtype).reshape((1,) * place.shape[0] + value.shape)
    if stacked.dtype != jnp.bfloat16:
        return lax.dynamic_update_slice(stacked, value, start)
    # XLA's CPU backend would rewrite the whole stack for every layer: it updates no bfloat16 slice.
    bits, part = (lax.bitcast_convert_type(array, jnp.uint16) for array in (stacked, value))
    return lax.bitcast_convert_type(lax.dynamic_update_slice(bits, part, start), jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def _copy(value: jax.Array, dtype: Any) -> jax.Array:
    return jnp.copy(value.astype(dtype))


class _Staging:
    """One host buffer through which every tensor passes on its way to the devices.

    A file's tensors seldom lie where a device can take them, and a fresh copy of each would leave
    the allocator holding several of them after they are gone.
    """

    ALIGNMENT = 64  # of jax's arrays on a CPU, which then takes the buffer as it is

    def __init__(self, size: int):
        size += self.ALIGNMENT * (jax.local_device_count() + 1)
        raw = np.empty(size, np.uint8)
        self._buffer = raw[-raw.ctypes.data % self.ALIGNMENT :]
        self.bytes_read = 0

    def put(
        self, shape: tuple[int, ...], read: Callable[[slice], np.ndarray], sharding: NamedSharding
    ) -> jax.Array:
        """Places the shards that are for this process's devices, and reads nothing else.

        Args:
          shape: of the whole array.
          read: returns rows of it, which may be a view of a file: only shards are looked at.
          sharding: over the devices of all processes.

        Returns:
          An array that is valid until the next call: it may be the buffer itself.
        """
        places = {  # (start, stop) in each dimension
            device: tuple(
                part.indices(size)[:2] for part, size in zip(at or (), shape, strict=True)
            )
            for device, at in sharding.addressable_devices_indices_map(shape).items()
        }
        first = min((at[0][0] for at in places.values() if at), default=0)
        last = max((at[0][1] for at in places.values() if at), default=None)
        value = read(slice(first, last))
        staged: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        used = 0
        for at in places.values():
            if at in staged:  # a copy for another device
                continue
            cut = [slice(*each) for each in at]
            cut[:1] = [slice(start - first, stop - first) for start, stop in at[:1]]
            part = value[tuple(cut)]
            target = self._buffer[used : used + part.nbytes].view(part.dtype).reshape(part.shape)
            np.copyto(target, part)
            staged[at] = target
            used += -(-part.nbytes // self.ALIGNMENT) * self.ALIGNMENT
            self.bytes_read += part.nbytes
        shards = [jax.device_put(staged[at], device) for device, at in places.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def load(
    definition: Definition,
    source: TensorSource,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> tuple[Tree, dict[str, str]]:
    """Streams a checkpoint into a tree of arrays.

    Each tensor is read once and goes straight to its devices and dtype; a stacked leaf is filled
    in place, layer by layer, so that the host never holds more than the tensor in hand. Of several
    processes each reads its own shards (and weights to be quantized whole).

    Args:
      definition: what the model needs.
      source: the checkpoint.
      mesh: where the arrays go.
      progress: shows a bar when it takes more than two seconds.

    Returns:
      (tree of every weight of the base model, {ignored tensor: reason}).

    Raises:
      JaxtuneError: tensors that are missing, unknown or of the wrong shape.
    """
    ignored = check_names(definition, source)
    leaves = definition.in_checkpoint()
    names = {path: layer_names(path, leaf.declaration) for path, leaf in leaves.items()}
    largest = max(_staged(leaves[p], source, name) for p, each in names.items() for name in each)
    staging = _Staging(largest)
    tree: dict[tuple[str, ...], Any] = {}
    with track(sum(map(len, names.values())), "loading weights", progress) as advance:
        for path, leaf in leaves.items():
            fill = _load_leaf if leaf.format is None else _load_quantized
            tree[path] = fill(leaf, names[path], source, mesh, staging, advance)
    logger.debug("process %d: %d bytes of weights", jax.process_index(), staging.bytes_read)
    return unflatten(tree), ignored


def _staged(leaf: Leaf, source: TensorSource, name: str) -> int:
    """Returns the most bytes of a tensor that are on their way to the devices at one time."""
    shape = source.shape(name)
    if leaf.format is None:
        return math.prod(shape) * source.dtype(name).itemsize
    return max(part.nbytes for part in leaf.format.parts(as_matrix(shape)).values())


def _load_leaf(
    leaf: Leaf,
    names: list[str],
    source: TensorSource,
    mesh: Mesh,
    staging: _Staging,
    advance: Callable[[], None],
) -> jax.Array:
    declaration = leaf.declaration
    sharding = named_sharding(mesh, declaration.axes)
    if not declaration.stack_shape:
        values = _copy(staging.put(*_reader(source, names[0]), sharding), leaf.dtype)
        values.block_until_ready()
        advance()
        return values
    stacked_sharding = named_sharding(mesh, declaration.stacked_axes)
    values = jnp.zeros(declaration.stacked_shape, leaf.dtype, device=stacked_sharding)
    for part, name in enumerate(names):
        place = np.array(np.unravel_index(part, declaration.stack_shape), np.int32)
        values = _fill(values, staging.put(*_reader(source, name), sharding), place)
        values.block_until_ready()
        advance()
    return values


def _reader(
    source: TensorSource, name: str
) -> tuple[tuple[int, ...], Callable[[slice], np.ndarray]]:
    return source.shape(name), functools.partial(source.read, name)


def _rows(value: np.ndarray, rows: slice) -> np.ndarray:
    return value[rows] if value.ndim else value


def _load_quantized(
    leaf: Leaf,
    names: list[str],
    source: TensorSource,
    mesh: Mesh,
    staging: _Staging,
    advance: Callable[[], None],
) -> QuantizedWeight:
    """Quantizes each layer's weight as it is read, and fills the stack of each part in place."""
    form, stack = leaf.format, leaf.declaration.stack_shape
    like = leaf.abstract(mesh)
    assert form is not None
    parts = {
        key: jnp.zeros(part.shape, part.dtype, device=part.sharding)
        for key, part in like.parts.items()
    }
    for index, name in enumerate(names):
        place = np.array(np.unravel_index(index, stack), np.int32) if stack else None
        for key, value in read_quantized(source, name, form).items():
            sharding = like.parts[key].sharding
            one = NamedSharding(mesh, PartitionSpec(*tuple(sharding.spec)[len(stack) :]))
            rows = functools.partial(_rows, value)
            part = staging.put(value.shape, rows, one)
            parts[key] = (
                _copy(part, part.dtype) if place is None else _fill(parts[key], part, place)
            )
            parts[key].block_until_ready()
        advance()
    return dataclasses.replace(like, parts=parts)
