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
    """Source of the weights of a checkpoint to write.

    A weight is identified by the path of its leaf, its flat index in the leaf's stack (`part`) and
    its Hugging Face name.
    """

    def plain(self, path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight with the declared shape, in `dtype` or its own dtype."""
        ...

    def quantized(self, path: TreePath, part: int, name: str, key: str) -> np.ndarray:
        """Returns the part `key` of a quantized weight, with the shape of `Format.parts`."""
        ...


class _TreeValues:
    """The weights of a model in memory, with edits merged."""

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
        # The parts of a weight are written in succession, so one result is kept.
        self._parts = functools.lru_cache(maxsize=1)(self._requantize)

    def _place(self, path: TreePath, part: int) -> tuple[Any, ...]:
        return tuple(np.unravel_index(part, self._leaves[path].declaration.stack_shape))

    def plain(self, path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight, as a view if it is in host memory."""
        if path in self._edits:
            return np.asarray(self._edits[path](part, dtype))
        value, place = self._values[path], self._place(path, part)
        if isinstance(value, QuantizedWeight):
            return np.asarray(_dequantize(value, place, jnp.dtype(dtype)))
        return _to_host(value, place)

    def quantized(self, path: TreePath, part: int, name: str, key: str) -> np.ndarray:
        """Returns a part of a weight; an edited weight is requantized."""
        if path in self._edits:
            return self._parts(path, part, name)[key]
        return _to_host(self._values[path].parts[key], self._place(path, part))

    def _requantize(self, path: TreePath, part: int, name: str) -> dict[str, np.ndarray]:
        place = self._place(path, part)
        frozen = jax.tree.map(lambda value: value[place], self._values[path])
        return self._requantizer(name, frozen, self._edits[path](part, jnp.float32))


class _SourceValues:
    """The weights of another checkpoint, read one at a time."""

    def __init__(self, definition: Definition, source: TensorSource):
        self._leaves, self._source = definition.leaves, source
        # The parts of a weight are written in succession, so one result is kept.
        self._parts = functools.lru_cache(maxsize=1)(self._quantize)

    def _quantize(self, name: str, form: Format) -> dict[str, np.ndarray]:
        return read_quantized(self._source, name, form)

    def plain(self, path: TreePath, part: int, name: str, dtype: Any) -> np.ndarray:
        """Returns a weight, as a view of the file if possible."""
        return self._source.read(name)

    def quantized(self, path: TreePath, part: int, name: str, key: str) -> np.ndarray:
        """Returns a part of a weight, which is quantized on the first call for it."""
        form = self._leaves[path].format
        assert form is not None
        return self._parts(name, form)[key]


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(weight: QuantizedWeight, place: tuple[Any, ...], dtype: Any) -> jax.Array:
    return jax.tree.map(lambda part: part[place], weight).dequantize(dtype)


def _to_host(value: jax.Array, place: tuple[Any, ...]) -> np.ndarray:
    """Returns one layer (and expert) of an array, as a view if it is in host memory."""
    devices = value.sharding.device_set
    in_host_memory = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return np.asarray(value)[place] if in_host_memory else np.asarray(value[place])


def _pending(
    definition: Definition, values: _Values, dtype: Any, quantized: bool
) -> Iterator[tuple[str, Pending]]:
    """Yields (name on disk, tensor) of every weight, sorted by layer; others come first."""
    order: list[tuple[int, str, TreePath, int]] = []
    for path, leaf in definition.in_checkpoint().items():
        layers = leaf.declaration.layers
        per_layer = math.prod(leaf.declaration.stack_shape) // (layers[1] if layers else 1)
        for part, name in enumerate(layer_names(path, leaf.declaration)):
            order.append((layers[0] + part // per_layer if layers else -1, name, path, part))

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
    """Yields (Hugging Face name, value) of every weight, sorted by layer.

    Values have the shape of one layer's weight; quantized weights are dequantized.

    Args:
      definition: definition of the model.
      tree: every weight of the base model.
      dtype: dtype of the values; None keeps each leaf's own.
      edits: functions that compute the merged weight of a layer, by path of the edited leaf.
    """
    values = _TreeValues(definition, tree, edits)
    for name, tensor in _pending(definition, values, dtype, quantized=False):
        yield name, tensor.make()


def merged_source(
    source: TensorSource, definition: Definition, tree: Tree, edits: Mapping[TreePath, WeightEdit]
) -> OverlaySource:
    """Returns the weights of a model in memory, with edits merged, as a checkpoint to read.

    Args:
      source: the checkpoint from which the model was loaded.
      definition: definition of the model.
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

    If edited weights are written quantized, each is requantized in turn (see `Requantizer`) and
    ``merge_report.json`` reports the rounding loss.

    The directory appears under its name only when it is complete.

    Args:
      directory: directory to create; it must be empty if it exists.
      definition: definition of the model.
      tree: every weight of the base model.
      tokenizer: tokenizer to save with the weights, if any.
      extra_files: further files by name: their content, or a file to copy.
      code_from: directory of the source, whose ``auto_map`` may reference Python files to copy.
      dtype: dtype of plain weights on disk; None keeps each leaf's own.
      edits: see `checkpoint_tensors`.
      quantized: whether to write quantized weights in their format rather than dequantized.
      original: the checkpoint from which the weights were quantized; edits are added to it.
      shard_bytes: maximum size of a file in bytes.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the directory exists and is not empty, or a merged weight is not finite.
    """
    # `_pending` computes a tensor when it is written, so the report is complete only afterwards.
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
    """Converts a checkpoint to the dtypes and weight formats of a definition.

    Tensors are read, quantized and written one at a time: the model is never held in memory.

    Args:
      directory: directory to create; it must be empty if it exists.
      definition: definition of the model to write.
      source: the checkpoint to read.
      tokenizer: tokenizer to save with the weights, if any.
      extra_files: further files by name: their content, or a file to copy.
      code_from: directory of the source, whose ``auto_map`` may reference Python files to copy.
      shard_bytes: maximum size of a file in bytes.
      progress: shows a progress bar if writing takes more than two seconds.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the checkpoint does not fit the definition, or the directory is not empty.
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
    """Writes config.json, the tokenizer and the other files of a checkpoint."""
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
    """Returns the writer of a weight format.

    Raises:
      JaxtuneError: the format has no writer.
    """
    if form.name not in WRITERS:
        raise JaxtuneError(
            f"weight format {form.name} cannot be written (formats with a writer: "
            f"{', '.join(sorted(WRITERS))}): save the model dequantized"
        )
    return WRITERS[form.name]


def _plain_modules(definition: Definition) -> list[str]:
    """Returns the modules with a plain matrix, which other tools must not treat as quantized."""
    leaves = definition.in_checkpoint()
    plain = [
        name.removesuffix(".weight")
        for path, leaf in leaves.items()
        if leaf.format is None and len(leaf.declaration.shape) == 2 and path[-1] == "weight"
        for name in layer_names(path, leaf.declaration)
    ]
    # A tied head has no tensor, but other tools see its module.
    return plain if ("lm_head", "weight") in leaves else [*plain, "lm_head"]
