"""Hugging Face checkpoints, both ways: streamed in tensor by tensor, written out in shards."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtune.adapters.merge import Edit
from jaxtune.checkpoints.atomic import new_directory
from jaxtune.checkpoints.fp8 import Float8Source, block_size
from jaxtune.checkpoints.gguf import GGUFSource
from jaxtune.checkpoints.progress import track
from jaxtune.checkpoints.quantize import read_quantized
from jaxtune.checkpoints.safetensors import SafetensorsFile, write_sharded
from jaxtune.checkpoints.source import ALL, TensorSource
from jaxtune.errors import JaxtuneError, closest, lookup
from jaxtune.layers.tree import Tree, flatten, layer_names, unflatten
from jaxtune.models.definition import Definition, Leaf, as_matrix
from jaxtune.parallel.mesh import named_sharding
from jaxtune.quant import Format, Quantization, QuantizedWeight, quantization_from_config
from jaxtune.quant.fp8 import Float8

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


class HuggingFaceSource:
    """A directory with config.json and model.safetensors, whole or sharded with an index."""

    def __init__(self, directory: Path):
        """Opens every file of a checkpoint and reads their headers.

        Raises:
          JaxtuneError: a file is missing, broken, or named outside the directory.
        """
        self.path = directory
        self.config = read_json(directory / "config.json")
        if (directory / INDEX).is_file():
            names = self._indexed_files()
        elif (directory / "model.safetensors").is_file():
            names = ["model.safetensors"]
        else:
            raise JaxtuneError(f"{directory}: holds neither model.safetensors nor {INDEX}")
        self._files = [SafetensorsFile(directory / name) for name in names]
        self._by_name: dict[str, SafetensorsFile] = {}
        for file in self._files:
            for name in file.names():
                if name in self._by_name:
                    raise JaxtuneError(f'{file.path}: tensor "{name}" is in another file as well')
                self._by_name[name] = file

    def _indexed_files(self) -> list[str]:
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise JaxtuneError(f'{self.path / INDEX}: has no "weight_map"')
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # An index is data from elsewhere: it may name files beside it and nothing else.
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise JaxtuneError(f"{self.path / INDEX}: refuses the file name {name!r}")
        return names

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape."""
        return self._by_name[name].shape(name)

    def dtype(self, name: str) -> np.dtype:
        """Returns a tensor's dtype."""
        return self._by_name[name].dtype(name)

    def read(self, name: str, rows: slice = ALL) -> np.ndarray:
        """Returns a tensor of the shape `shape(name)`, or rows of it, as a view of the file."""
        value = self._by_name[name].read(name)
        return value[rows] if value.ndim else value

    def read_parts(self, name: str, form: Format) -> None:
        """Returns None: the tensors are plain."""
        del name, form

    def where(self, name: str) -> str:
        """Returns the file that holds a tensor."""
        return str(self._by_name[name].path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      JaxtuneError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JaxtuneError(f"{path}: no such file") from None
    except OSError as error:
        raise JaxtuneError(f"{path}: cannot read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise JaxtuneError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise JaxtuneError(f"{path}: not a JSON object")
    return content


FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")


def resolve_path(path: str, revision: str = "", files: Sequence[str] = FILES) -> Path:
    """Returns the local directory or .gguf file of a model, fetching a hub id if need be.

    Args:
      path: of a directory or a .gguf file, or a hub id.
      revision: of the hub id; empty: its default branch.
      files: patterns of what to fetch.

    Raises:
      JaxtuneError: neither a local path nor a hub id that can be fetched.
    """
    if not path:
        raise JaxtuneError("model.path is empty: give a Hugging Face directory, hub id or .gguf")
    local = Path(path).expanduser()
    if local.exists():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or path.endswith(".gguf"):
        raise JaxtuneError(f"{path}: no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(path, revision=revision or None, allow_patterns=list(files)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise JaxtuneError(
            f"{path}: no such directory here, not in the hub's cache, and the hub is out of reach "
            "(no network, or HF_HUB_OFFLINE is set)"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JaxtuneError(f"{path}: not a local path, and the hub says: {reason}") from error


# What a config.json calls the quantization of its weights, and the source that undoes it.
QUANTIZED_SOURCES: dict[str, Callable[[TensorSource], TensorSource]] = {"fp8": Float8Source}


def open_source(path: Path) -> TensorSource:
    """Opens a Hugging Face directory, whose weights may be quantized, or a .gguf file.

    Raises:
      JaxtuneError: neither of these, or a quantization that is not known.
    """
    if path.is_dir():
        source = HuggingFaceSource(path)
        settings = source.config.get("quantization_config")
        if settings is None:
            return source
        kind = str(settings.get("quant_method") if isinstance(settings, Mapping) else settings)
        return lookup(QUANTIZED_SOURCES, kind, f"{path}: quantization_config.quant_method")(source)
    if path.suffix == ".gguf":
        return GGUFSource(path)
    raise JaxtuneError(f"{path}: neither a Hugging Face directory nor a .gguf file")


# The format in which such a checkpoint holds its weights, from the same settings.
STORED_FORMATS: dict[str, Callable[[Mapping[str, Any], Path], Format]] = {
    "fp8": lambda settings, path: Float8(block_size(settings, path))
}


def choose_quantization(section: Any, model_config: Mapping[str, Any]) -> Quantization | None:
    """Returns how the base is quantized: as a config's ``quantize`` section says.

    Where the checkpoint is stored in the same format, its own settings are kept, and with them
    every bit.

    Args:
      section: of a resolved config.
      model_config: the content of the checkpoint's config.json.
    """
    quantization = quantization_from_config(section)
    settings = model_config.get("quantization_config")
    if quantization is None or not isinstance(settings, Mapping):
        return quantization
    make = STORED_FORMATS.get(str(settings.get("quant_method")))
    stored = None if make is None else make(settings, Path())
    if stored is None or stored.name != quantization.format.name:
        return quantization
    return dataclasses.replace(quantization, format=stored)


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


def _check_names(definition: Definition, source: TensorSource) -> dict[str, str]:
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
        raw = np.empty(size + self.ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % self.ALIGNMENT
        self._buffer = raw[start : start + size]

    def put(self, value: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """Returns an array that is valid until the next call: it may be the buffer itself."""
        staged = self._buffer[: value.nbytes].view(value.dtype).reshape(value.shape)
        np.copyto(staged, value)
        return jax.device_put(staged, sharding)


def load(
    definition: Definition,
    source: TensorSource,
    mesh: Mesh,
    *,
    progress: bool = True,
) -> tuple[Tree, dict[str, str]]:
    """Streams a checkpoint into a tree of arrays.

    Each tensor is read once and goes straight to its devices and dtype; a stacked leaf is filled
    in place, layer by layer, so that the host never holds more than the tensor in hand.

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
    ignored = _check_names(definition, source)
    leaves = definition.in_checkpoint()
    names = {path: layer_names(path, leaf.declaration) for path, leaf in leaves.items()}
    largest = max(_staged(leaves[p], source, name) for p, each in names.items() for name in each)
    staging = _Staging(largest)
    tree: dict[tuple[str, ...], Any] = {}
    with track(sum(map(len, names.values())), "loading weights", progress) as advance:
        for path, leaf in leaves.items():
            fill = _load_leaf if leaf.format is None else _load_quantized
            tree[path] = fill(leaf, names[path], source, mesh, staging, advance)
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
        values = _copy(staging.put(source.read(names[0]), sharding), leaf.dtype)
        values.block_until_ready()
        advance()
        return values
    stacked_sharding = named_sharding(mesh, declaration.stacked_axes)
    values = jnp.zeros(declaration.stacked_shape, leaf.dtype, device=stacked_sharding)
    for part, name in enumerate(names):
        place = np.array(np.unravel_index(part, declaration.stack_shape), np.int32)
        values = _fill(values, staging.put(source.read(name), sharding), place)
        values.block_until_ready()
        advance()
    return values


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
            part = staging.put(value, one)
            parts[key] = (
                _copy(part, part.dtype) if place is None else _fill(parts[key], part, place)
            )
            parts[key].block_until_ready()
        advance()
    return dataclasses.replace(like, parts=parts)


def checkpoint_tensors(
    definition: Definition,
    tree: Tree,
    dtype: Any,
    edits: Mapping[tuple[str, ...], Edit],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, value) of every weight, in layer order where there are layers.

    Values have the shape of one layer's weight.

    Args:
      definition: of the model.
      tree: every weight of the base model.
      dtype: to write; None keeps each leaf's own.
      edits: by path, how to compute a layer's weight where it is not the tree's.
    """
    values = dict(flatten(tree))
    order: list[tuple[int, str, tuple[str, ...], int]] = []
    for path, leaf in definition.in_checkpoint().items():
        layers = leaf.declaration.layers
        each = math.prod(leaf.declaration.stack_shape) // (layers[1] if layers else 1)
        for part, name in enumerate(layer_names(path, leaf.declaration)):
            order.append((layers[0] + part // each if layers else -1, name, path, part))
    for _, name, path, part in sorted(order):
        leaf = definition.leaves[path]
        if path in edits:
            value = np.asarray(edits[path](part, dtype or leaf.dtype))
        else:
            place = np.unravel_index(part, leaf.declaration.stack_shape)
            value = _to_host(values[path], place, dtype or leaf.dtype)
        kept = leaf.declaration.dtype or dtype or leaf.dtype
        yield name, value.astype(kept, copy=False)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(weight: QuantizedWeight, place: tuple[Any, ...], dtype: Any) -> jax.Array:
    return jax.tree.map(lambda part: part[place], weight).dequantize(dtype)


def _to_host(value: Any, place: tuple[Any, ...], dtype: Any) -> np.ndarray:
    """Returns one layer (and expert) of a weight, as a view where it is in host memory already.

    A quantized one is dequantized to `dtype`.
    """
    if isinstance(value, QuantizedWeight):
        return np.asarray(_dequantize(value, place, jnp.dtype(dtype)))
    devices = value.sharding.device_set
    in_host_memory = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return np.asarray(value)[place] if in_host_memory else np.asarray(value[place])


def save(
    directory: str | Path,
    definition: Definition,
    tree: Tree,
    *,
    tokenizer: Any = None,
    extra_files: Mapping[str, Path] | None = None,
    dtype: Any = None,
    edits: Mapping[tuple[str, ...], Edit] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a Hugging Face checkpoint: sharded safetensors, index, config.json, tokenizer.

    Nothing appears under the final name before everything is written.

    Args:
      directory: to create; an existing one that is not empty is refused.
      definition: of the model.
      tree: every weight of the base model.
      tokenizer: saved beside the weights, if given.
      extra_files: further files to copy, by name.
      dtype: of the weights on disk; None keeps each leaf's own.
      edits: see `checkpoint_tensors`.
      shard_bytes: the most that one file holds.

    Returns:
      The directory.
    """
    with new_directory(directory) as scratch:
        tensors = checkpoint_tensors(definition, tree, dtype, edits or {})
        write_sharded(scratch, tensors, shard_bytes)
        config = {k: v for k, v in definition.config.items() if k != "quantization_config"}
        kinds = {
            str(jnp.dtype(dtype or leaf.dtype)) for leaf in definition.in_checkpoint().values()
        }
        # transformers 5 writes and reads "dtype"; older tools know it as "torch_dtype".
        for key in {"dtype", *config} & {"dtype", "torch_dtype"}:
            config[key] = "bfloat16" if "bfloat16" in kinds else next(iter(kinds))
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (scratch / "config.json").write_text(text, encoding="utf-8")
        for name, path in (extra_files or {}).items():
            shutil.copyfile(path, scratch / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return Path(directory)
