"""Writing Hugging Face checkpoints, plain or quantized, from a model or from another checkpoint."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.merge import WeightEdit
from jaxtune.atomic_files import new_directory, refuse_taken
from jaxtune.checkpoints.formats.registry import WRITERS, FormatWriter
from jaxtune.checkpoints.formats.safetensors import Pending, write_sharded
from jaxtune.checkpoints.remote_code import keep_named_code
from jaxtune.checkpoints.requantize import Requantizer, warn_of_loss, write_report
from jaxtune.checkpoints.source import TensorSource
from jaxtune.checkpoints.streaming import check_names
from jaxtune.checkpoints.values import SourceValues, TreeValues, Values
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import Path as TreePath
from jaxtune.layers.tree import Tree, layer_names
from jaxtune.models.definition import Definition, as_matrix
from jaxtune.parallel.processes import barrier, leads, on_leader
from jaxtune.progress import track
from jaxtune.quant import Format

SHARD_BYTES = 2 * 2**30


def _pending(
    definition: Definition, values: Values, dtype: Any, quantized: bool
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
    edits: Mapping[str, WeightEdit],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, value) of every weight, sorted by layer.

    Values have the shape of one layer's weight; quantized weights are dequantized.

    Args:
      definition: definition of the model.
      tree: every weight of the base model.
      dtype: dtype of the values; None keeps each leaf's own.
      edits: edits to merge, by name; see `jaxtune.adapters.merge.edits`.
    """
    values = TreeValues(definition, tree, edits)
    for name, tensor in _pending(definition, values, dtype, quantized=False):
        yield name, tensor.make()


class Beside(NamedTuple):
    """The files of a checkpoint other than weights and config.json.

    Attributes:
      tokenizer: tokenizer to save with the weights, if any.
      extra_files: further files by name: their content, or a file to copy.
      code_from: directory of the source, whose ``auto_map`` may reference Python files to copy.
    """

    tokenizer: Any = None
    extra_files: Mapping[str, Path | bytes] = MappingProxyType({})
    code_from: Path | None = None


WEIGHTS_ALONE = Beside()


def save(
    directory: str | Path,
    definition: Definition,
    tree: Tree,
    *,
    beside: Beside = WEIGHTS_ALONE,
    dtype: Any = None,
    edits: Mapping[str, WeightEdit] | None = None,
    quantized: bool = False,
    original: TensorSource | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the Hugging Face checkpoint of a model in memory.

    If edited weights are written quantized, each is requantized in turn (see `Requantizer`) and
    ``merge_report.json`` reports the rounding loss.

    The model may be sharded over the devices of several processes. Then all of them call the
    function, its tensors are gathered one at a time, and process 0 writes.

    Args:
      directory: directory to create; it must be empty if it exists.
      definition: definition of the model.
      tree: every weight of the base model.
      beside: tokenizer and further files.
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
    on_leader(lambda: refuse_taken(directory))  # before all processes gather tensors
    requantizer = Requantizer(original)
    values = TreeValues(definition, tree, edits or {}, requantizer)
    tensors = list(_pending(definition, values, dtype, quantized))
    if not leads():  # takes part in gathering
        for _, tensor in tensors:
            tensor.make()
    else:
        config = _config(definition, dtype, quantized)
        report = requantizer if quantized and edits else None
        _write(directory, tensors, config, beside, report, shard_bytes)
    barrier("the checkpoint is written")
    return Path(directory)


def convert(
    directory: str | Path,
    definition: Definition,
    source: TensorSource,
    *,
    beside: Beside = WEIGHTS_ALONE,
    dtype: Any = None,
    edits: Mapping[str, WeightEdit] | None = None,
    quantized: bool = True,
    original: TensorSource | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Converts a checkpoint to the dtypes and weight formats of a definition, with edits merged.

    Tensors are read, edited, quantized and written one at a time: the model is never held in
    memory. The files are bit for bit those of `save` for the loaded model.

    Args:
      directory: directory to create; it must be empty if it exists.
      definition: definition of the model to write.
      source: the checkpoint to read.
      beside: tokenizer and further files.
      dtype: dtype of plain weights on disk; None keeps each leaf's own.
      edits: see `checkpoint_tensors`.
      quantized: whether to write quantized weights in their format rather than dequantized.
      original: see `save`.
      shard_bytes: maximum size of a file in bytes.
      progress: shows a progress bar if writing takes more than two seconds.

    Returns:
      The directory.

    Raises:
      JaxtuneError: the checkpoint does not fit the definition, the directory is not empty, or a
        merged weight is not finite.
    """
    check_names(definition, source)
    requantizer = Requantizer(original)
    values = SourceValues(definition, source, edits, requantizer)
    tensors = list(_pending(definition, values, dtype, quantized))
    config = _config(definition, dtype, quantized)
    report = requantizer if quantized and edits else None
    _write(directory, tensors, config, beside, report, shard_bytes, progress)
    return Path(directory)


def _write(
    directory: str | Path,
    tensors: Sequence[tuple[str, Pending]],
    config: Mapping[str, Any],
    beside: Beside,
    report: Requantizer | None,
    shard_bytes: int,
    progress: bool = False,
) -> None:
    """Writes the files of a checkpoint; the directory appears only when it is complete."""
    with new_directory(directory) as scratch:
        with track(len(tensors), "writing weights", progress) as advance:
            write_sharded(scratch, tensors, shard_bytes, advance)
        if report is not None:  # complete only now: a tensor is computed when it is written
            measures = report.report()
            warn_of_loss(measures)
            write_report(scratch, measures)
        _write_beside(scratch, config, beside)


def _write_beside(directory: Path, config: Mapping[str, Any], beside: Beside) -> None:
    """Writes config.json, the tokenizer and the other files of a checkpoint."""
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name, content in beside.extra_files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)
    if beside.tokenizer is not None:
        beside.tokenizer.save_pretrained(directory)
    keep_named_code(directory, beside.code_from)


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
