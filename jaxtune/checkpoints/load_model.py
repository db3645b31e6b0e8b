"""Loads a model: checkpoint, method and optional adapter become a definition and its trees."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxtune.adapters import Method, StoredAdapter, method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.method import Start
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.overlay import with_base_edit
from jaxtune.checkpoints.source import TensorSource
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import Tree, merge
from jaxtune.models.definition import Definition
from jaxtune.parallel.memory import bytes_per_device, check_fits
from jaxtune.quant import Quantization


class LoadedModel(NamedTuple):
    """A model in memory.

    Attributes:
      definition: abstract model with its method.
      base: tree of frozen weights.
      trainable: tree of trained arrays.
      constants: tree of the method's constants.
      ignored: unused tensors of the checkpoint, each with the reason.
      method: the fine-tuning method; None for the base model alone.
    """

    definition: Definition
    base: Tree
    trainable: Tree
    constants: Tree
    ignored: dict[str, str]
    method: Method | None = None


def load_model(
    source: TensorSource,
    dtype: DTypeLike,
    mesh: Mesh,
    *,
    method: Method | None = None,
    quantization: Quantization | None = None,
    stored: StoredAdapter | None = None,
    seed: int = 0,
    progress: bool = True,
) -> LoadedModel:
    """Loads the weights and initialises the method's arrays.

    Args:
      source: the checkpoint.
      dtype: dtype of frozen weights.
      mesh: mesh on which arrays are placed.
      method: the fine-tuning method; None for the base model alone.
      quantization: weight format of frozen weights, which are quantized while they stream in;
        None to leave them plain.
      stored: an adapter to start from; None for the method's initial values.
      seed: seed of the initial values.
      progress: shows a progress bar if loading takes more than two seconds.

    Raises:
      JaxtuneError: checkpoint, method and adapter do not match, or the weights do not fit.
    """
    definition = define(source.config, dtype, method, quantization)
    frozen = bytes_per_device(definition.abstract("base", mesh))
    check_fits(f"{source.path}: the weights in {dtype}", mesh, frozen)
    if stored is not None:
        check_copies(source, stored)
    # A method may edit weights while they stream in (PiSSA), and `complete` may read the loaded
    # weights (DoRA's norms, ESFT's experts), so the method's arrays come last.
    edit = None if method is None else method.base_edit(definition, stored)
    start = Start(edit) if stored is None else None
    read_from = source if edit is None else with_base_edit(source, edit)
    weights, ignored = huggingface.load(definition, read_from, mesh, progress=progress)
    added: tuple[Tree, Tree] = ({}, {})
    if method is not None:
        fresh = stored is None
        added = method.init(definition, seed) if fresh else method.restore(definition, stored)
        added = method.complete(definition, weights, added, start)
    parts: dict[Any, Tree] = definition.split(merge(weights, *added))
    trees = parts["base"], parts["trainable"], parts["constants"]
    return LoadedModel(definition, *trees, ignored, method)


def attach_adapter(
    bare: LoadedModel,
    source: TensorSource,
    dtype: DTypeLike,
    stored: StoredAdapter,
    quantization: Quantization | None = None,
) -> LoadedModel:
    """Attaches an adapter to loaded weights, which are shared and not copied.

    Args:
      bare: the model without a method.
      source: the checkpoint from which it was loaded.
      dtype: dtype of frozen weights.
      stored: the adapter.
      quantization: weight format of frozen weights, if any.

    Raises:
      JaxtuneError: model and adapter do not match.
    """
    method = method_from_peft(stored)
    if method.dropout:  # not applied here, and rejected for some modules (see LinearMethod.attach)
        method = dataclasses.replace(method, dropout=0.0)  # type: ignore[type-var]
    definition = define(bare.definition.config, dtype, method, quantization)
    check_copies(source, stored)
    added = method.restore(definition, stored)
    added = method.complete(definition, bare.base, added, None)
    parts: dict[Any, Tree] = definition.split(merge(bare.base, *added))
    return LoadedModel(
        definition, parts["base"], parts["trainable"], parts["constants"], bare.ignored, method
    )


def check_copies(source: TensorSource, stored: StoredAdapter) -> None:
    """Checks an adapter's copies of frozen weights against the checkpoint.

    Raises:
      JaxtuneError: a copy differs, because the adapter belongs to another base.
    """
    for name, copy in stored.base_copies().items():
        ours = source.read(name) if name in source.names() else None
        if ours is None or not np.array_equal(ours.astype(copy.dtype), copy):
            raise JaxtuneError(
                f"adapter_model.safetensors: its copy of {name} differs from the checkpoint's, "
                "so the adapter belongs to another base model"
            )
