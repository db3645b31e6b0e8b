"""Writing Hugging Face checkpoints, plain or quantized, from a model or from another checkpoint."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.merge import WeightEdit
from jaxtune.atomic_files import new_directory
from jaxtune.checkpoints.formats.registry import WRITERS, FormatWriter
from jaxtune.checkpoints.formats.safetensors import Pending, write_sharded
from jaxtune.checkpoints.overlay import OverlaySource
from jaxtune.checkpoints.quantize import read_quantized
from jaxtune.checkpoints.remote_code import keep_named_code
from jaxtune.checkpoints.requantize import Requantizer, warn_of_loss, write_report
from jaxtune.checkpoints.source import TensorSource
from jaxtune.checkpoints.streaming import check_names
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import Path as TreePath
from jaxtune.layers.tree import Tree, flatten, layer_names
from jaxtune.models.definition import Definition, as_matrix
from jaxtune.progress import track
from jaxtune.quant import Format, QuantizedWeight

SHARD_BYTES = 2 * 2**30


class _Values(Protocol):
    """Where the weights of a checkpoint to write come from.

    A weight is known by its leaf's path, by which one of the leaf's stack it is, and by its name.
    """

    def plain(self, path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight of the shape of its declaration, in `dtype` or in its own."""
        ...

    def quantized(self, path: TreePath, part: int, name: str, key: str) -> np.ndarray:
        """Returns a part of a quantized weight, of the shape that its format says."""
        ...


class _TreeValues:
    """The weights of a model in memory, edits folded in."""

    def __init__(
        self,
        definition: Definition,
        tree: Tree,
        edits: Mapping[TreePath, WeightEdit],
        requantizer: Requantizer | None = None,
    ):
        self._leaves, self._edits = definition.leaves, edits
        self._values = dict(flatten(tree))
        self._requantizer = Requantizer() if requantizer is None else requantizer
        # The tensors of one weight are written one after the other.
        self._parts = functools.lru_cache(maxsize=1)(self._requantize)

    def _place(self, path: TreePath, part: int) -> tuple[Any, ...]:
        return tuple(np.unravel_index(part, self._leaves[path].declaration.stack_shape))

    def plain(self, path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight, as a view where it is in host memory already."""
        if path in self._edits:
            return np.asarray(self._edits[path](part, dtype))
        value, place = self._values[path], self._place(path, part)
        if isinstance(value, QuantizedWeight):
            return np.asarray(_dequantize(value, place, jnp.dtype(dtype)))
        return _to_host(value, place)

    def quantized(self, path: TreePath, part: int, name: str, key: str) -> np.ndarray:
        """Returns a part of a weight, quantized anew where it is edited."""
        if path in self._edits:
            return self._parts(path, part, name)[key]
        return _to_host(self._values[path].parts[key], self._place(path, part))

    def _requantize(self, path: TreePath, part: int, name: str) -> dict[str, np.ndarray]:
        place = self._place(path, part)
        frozen = jax.tree.map(lambda value: value[place], self._values[path])
        return self._requantizer(name, frozen, self._edits[path](part, jnp.float32))


class _SourceValues:
    """The weights of another checkpoint, of which one at a time is in memory."""

    def __init__(self, definition: Definition, source: TensorSource):
        self._leaves, self._source = definition.leaves, source
        # The tensors of one weight are written one after the other.
        self._parts = functools.lru_cache(maxsize=1)(self._quantize)

    def _quantize(self, name: str, form: Format) -> dict[str, np.ndarray]:
        return read_quantized(self._source, name, form)

    def plain(self, path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight, as a view where the file allows it."""
        return self._source.read(name)

    def quantized(self, path: TreePath, part: int, name: str, key: str) -> np.ndarray:
        """Returns a part of a weight, which is quantized when its first part is asked for."""
        form = self._leaves[path].format
        assert form is not None
        return self._parts(name, form)[key]


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(weight: QuantizedWeight, place: tuple[Any, ...], dtype: Any) -> jax.Array:
    return jax.tree.map(lambda part: part[place], weight).dequantize(dtype)


def _to_host(value: jax.Array, place: tuple[Any, ...]) -> np.ndarray:
    """Returns one layer (and expert) of an array, as a view where it is in host memory already."""
    devices = value.sharding.device_set
    in_host_memory = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return np.asarray(value)[place] if in_host_memory else np.asarray(value[place])


def _pending(
    definition: Definition, values: _Values, dtype: Any, quantized: bool
) -> Iterator[tuple[str, Pending]]:
    """Yields (name on disk, tensor) of every weight, in layer order where there are layers."""
    order: list[tuple[int, str, TreePath, int]] = []
    for path, leaf in definition.in_checkpoint().items():
        layers = leaf.declaration.layers
        each = math.prod(leaf.declaration.stack_shape) // (layers[1] if layers else 1)
        for part, name in enumerate(layer_names(path, leaf.declaration)):
            order.append((layers[0] + part // each if layers else -1, name, path, part))

    def plain(path: TreePath, part: int, name: str, computed: Any, kept: Any) -> np.ndarray:
        return values.plain(path, part, name, computed).astype(kept, copy=False)

    for _, name, path, part in sorted(order):
        leaf = definition.leaves[path]
        computed = jnp.dtype(dtype or leaf.dtype)
        if quantized and leaf.format is not None:
            shape = as_matrix(leaf.declaration.shape)
            give = functools.partial(values.quantized, path, part, name)
            write = _writer(leaf.format).tensors
            module = name.removesuffix(".weight")
            yield from write(module, leaf.format, shape, str(computed), give).items()
            continue
        kept = jnp.dtype(leaf.declaration.dtype or computed)
        make = functools.partial(plain, path, part, name, computed, kept)
        yield name, Pending(leaf.declaration.shape, kept, make)


def checkpoint_tensors(
    definition: Definition,
    tree: Tree,
    dtype: Any,
    edits: Mapping[TreePath, WeightEdit],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, value) of every weight, in layer order where there are layers.

    Values have the shape of one layer's weight; quantized ones are dequantized.

    Args:
      definition: of the model.
      tree: every weight of the base model.
      dtype: to write; None keeps each leaf's own.
      edits: by path, how to compute a layer's weight where it is not the tree's.
    """
    values = _TreeValues(definition, tree, edits)
    for name, tensor in _pending(definition, values, dtype, quantized=False):
        yield name, tensor.make()


def merged_source(
    source: TensorSource, definition: Definition, tree: Tree, edits: Mapping[TreePath, WeightEdit]
) -> OverlaySource:
    """Returns the weights of a model in memory, edits folded in, as a checkpoint to read.

    Args:
      source: the checkpoint that the model was loaded from.
      definition: of the model.
      tree: every weight of the base model.
      edits: see `checkpoint_tensors`.
    """
    values, replaced = _TreeValues(definition, tree, edits), {}

    def value(path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        return values.plain(path, part, name, dtype).astype(np.float32)

    for path, leaf in definition.in_checkpoint().items():
        for part, name in enumerate(layer_names(path, leaf.declaration)):
            replaced[name] = functools.partial(value, path, part, name, leaf.dtype)
    return OverlaySource(source, replaced)


def save(
    directory: str | Path,
    definition: Definition,
    tree: Tree,
    *,
    tokenizer: Any = None,
    extra_files: Mapping[str, Path | bytes] | None = None,
    code_from: Path | None = None,
    dtype: Any = None,
    edits: Mapping[TreePath, WeightEdit] | None = None,
    quantized: bool = False,
    original: TensorSource | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes a Hugging Face checkpoint: sharded safetensors, index, config.json, tokenizer.

    Where edited weights are written quantized, one at a time is quantized anew (see `Requantizer`),
    and what that costs is in ``merge_report.json`` beside them.

    Nothing appears under the final name before everything is written.

    Args:
      directory: to create; an existing one that is not empty is refused.
      definition: of the model.
      tree: every weight of the base model.
      tokenizer: saved beside the weights, if given.
      extra_files: further files, by name: what to write, or a file to copy.
      code_from: directory of the source, whose ``auto_map`` may name Python files to copy.
      dtype: of the plain weights on disk; None keeps each leaf's own.
      edits: see `checkpoint_tensors`.
      quantized: writes quantized weights as they are, and not dequantized.
      original: the checkpoint that the weights were quantized from, onto which edits are put.
      shard_bytes: the most that one file holds.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the directory is taken, or a merged weight has values that are not finite.
    """
    requantizer = Requantizer(original)
    values = _TreeValues(definition, tree, edits or {}, requantizer)
    tensors = _pending(definition, values, dtype, quantized)
    with new_directory(directory) as scratch:
        write_sharded(scratch, tensors, shard_bytes)
        if quantized and edits:
            report = requantizer.report()
            warn_of_loss(report)
            write_report(scratch, report)
        _write_beside(scratch, _config(definition, dtype, quantized), extra_files, tokenizer)
        keep_named_code(scratch, code_from)
    return Path(directory)


def convert(
    directory: str | Path,
    definition: Definition,
    source: TensorSource,
    *,
    tokenizer: Any = None,
    extra_files: Mapping[str, Path | bytes] | None = None,
    code_from: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint anew, in the dtypes and weight formats of a definition.

    Tensors are read, quantized and written one at a time: the model is never in memory.

    Args:
      directory: to create; an existing one that is not empty is refused.
      definition: of the model to write.
      source: the checkpoint to read.
      tokenizer: saved beside the weights, if given.
      extra_files: further files, by name: what to write, or a file to copy.
      code_from: directory of the source, whose ``auto_map`` may name Python files to copy.
      shard_bytes: the most that one file holds.
      progress: shows a bar when it takes more than two seconds.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the checkpoint does not fit the definition, or the directory is taken.
    """
    check_names(definition, source)
    tensors = list(_pending(definition, _SourceValues(definition, source), None, quantized=True))
    with new_directory(directory) as scratch:
        with track(len(tensors), "writing weights", progress) as advance:
            write_sharded(scratch, tensors, shard_bytes, advance)
        _write_beside(scratch, _config(definition, None, True), extra_files, tokenizer)
        keep_named_code(scratch, code_from)
    return Path(directory)


def _write_beside(
    directory: Path,
    config: Mapping[str, Any],
    extra_files: Mapping[str, Path | bytes] | None,
    tokenizer: Any,
) -> None:
    """Writes what a checkpoint has beside its weights."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name, content in (extra_files or {}).items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _config(definition: Definition, dtype: Any, quantized: bool) -> dict[str, Any]:
    """Returns the content of config.json."""
    leaves = definition.in_checkpoint().values()
    config = {k: v for k, v in definition.config.items() if k != "quantization_config"}
    kinds = {str(jnp.dtype(dtype or leaf.dtype)) for leaf in leaves}
    kind = "bfloat16" if "bfloat16" in kinds else next(iter(kinds))
    # transformers 5 writes and reads "dtype"; older tools know it as "torch_dtype".
    for key in {"dtype", *config} & {"dtype", "torch_dtype"}:
        config[key] = kind
    forms = {leaf.format for leaf in leaves if leaf.format is not None}
    if quantized and forms:
        (form,) = forms
        settings = _writer(form).settings(form, _plain_modules(definition), kind)
        config["quantization_config"] = settings
    return config


def _writer(form: Format) -> FormatWriter:
    """Returns what writes a weight format.

    Raises:
      JaxtuneError: there is no writer for it.
    """
    if form.name not in WRITERS:
        raise JaxtuneError(
            f"weight format {form.name} cannot be written (formats with a writer: "
            f"{', '.join(sorted(WRITERS))}): save the model dequantized"
        )
    return WRITERS[form.name]


def _plain_modules(definition: Definition) -> list[str]:
    """Returns the names of the modules with a plain matrix, which other tools must not replace."""
    leaves = definition.in_checkpoint()
    plain = [
        name.removesuffix(".weight")
        for path, leaf in leaves.items()
        if leaf.format is None and len(leaf.declaration.shape) == 2 and path[-1] == "weight"
        for name in layer_names(path, leaf.declaration)
    ]
    # A tied head has no tensor of its own, and is a module to other tools all the same.
    return plain if ("lm_head", "weight") in leaves else [*plain, "lm_head"]
