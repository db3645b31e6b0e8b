"""Merging an adapter into a checkpoint, tensor by tensor: the model is never held in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from jaxtune.adapters import Method, StoredAdapter
from jaxtune.adapters.define import define
from jaxtune.adapters.merge import WeightEdit, check_merges, edits, replacement
from jaxtune.checkpoints.load_model import check_copies
from jaxtune.checkpoints.overlay import OverlaySource, with_base_edit, with_trained_weights
from jaxtune.checkpoints.source import TensorSource
from jaxtune.checkpoints.values import merged_source
from jaxtune.layers.tree import Tree, layer_names
from jaxtune.models.definition import Definition
from jaxtune.quant import Quantization


class Merge(NamedTuple):
    """A checkpoint and what to change in it; a tensor is read and computed when it is needed.

    Attributes:
      definition: abstract model with its method.
      source: the frozen weights before they are quantized, and the trained weights of the base.
      edits: edits by Hugging Face name; see `jaxtune.adapters.merge.edits`.
      original: the checkpoint to whose weights edits are added if the result is quantized; None if
        the frozen weights differ from it by more than the quantization.
    """

    definition: Definition
    source: TensorSource
    edits: Mapping[str, WeightEdit]
    original: TensorSource | None

    def as_source(self) -> OverlaySource:
        """Returns the merged model with dequantized weights as a checkpoint to read."""
        return merged_source(self.source, self.definition, self.edits)


def merge_adapter(
    source: TensorSource,
    dtype: DTypeLike,
    method: Method,
    stored: StoredAdapter,
    quantization: Quantization | None = None,
) -> Merge:
    """Prepares the merge of an adapter; see `load_model` for the arguments.

    Raises:
      JaxtuneError: checkpoint, method and adapter do not match, or the method does not edit
        weights.
    """
    check_merges(method)
    definition = define(source.config, dtype, method, quantization)
    check_copies(source, stored)
    whole = method.whole_weights(definition, stored)
    trained = {
        name
        for path, leaf in definition.of_kind("trainable").items()
        if leaf.in_checkpoint
        for name in layer_names(path, leaf.declaration)
    }
    base_edit = method.base_edit(definition, stored)
    read_from = source if base_edit is None else with_base_edit(source, base_edit)
    read_from = OverlaySource(
        read_from, {name: functools.partial(_float32, whole[name]) for name in trained}
    )
    restored = method.restore_edits(definition, stored)
    abstract = (definition.abstract(kind) for kind in ("base", "trainable", "constants"))
    found = edits(definition.bind(*abstract, *restored))
    for name in whole.keys() - trained:  # experts of ESFT
        found[name] = replacement(functools.partial(_float32, whole[name]))
    return Merge(definition, read_from, found, None if method.edits_base else source)


def merge_trained(source: TensorSource, definition: Definition, trainable: Tree) -> Merge:
    """Prepares a checkpoint with weights that a run has trained in full.

    Args:
      source: the checkpoint from which the run started.
      definition: definition of the run's model.
      trainable: tree of trained stacks, which are read one layer (and expert) at a time.
    """
    return Merge(definition, with_trained_weights(source, definition, trainable), {}, source)


def _float32(value: Any) -> np.ndarray:
    return np.asarray(value).astype(np.float32)
