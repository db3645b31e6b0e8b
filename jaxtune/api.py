"""The Python interface: load a model, look at it, generate with it, save it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxtune.adapters import Method, Stored, method_from_peft
from jaxtune.adapters.full import Full
from jaxtune.adapters.merge import edits
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.peft import read_adapter
from jaxtune.checkpoints.tokenizer import load_tokenizer
from jaxtune.errors import JaxtuneError, lookup
from jaxtune.layers.attention import choose_backend
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree, merge
from jaxtune.models import build_model
from jaxtune.models.definition import Definition
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.quant import FORMATS

DTYPES = ("bfloat16", "float32")


class Model:
    """A loaded model: its definition, its three trees and, where there is one, its tokenizer."""

    def __init__(
        self,
        definition: Definition,
        base: Tree,
        trainable: Tree,
        constants: Tree,
        *,
        source: Path,
        mesh: Mesh,
        dtype: Any,
        attention: str = "auto",
    ):
        self.definition = definition
        self.base, self.trainable, self.constants = base, trainable, constants
        self.source, self.mesh = source, mesh
        backend = choose_backend(attention, mesh.devices.flat[0].platform)
        self.options = ForwardOptions(jnp.dtype(dtype), backend, "none")

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer.

        Raises:
          JaxtuneError: the checkpoint has no tokenizer files.
        """
        tokenizer = load_tokenizer(self.source)
        if tokenizer is None:
            raise JaxtuneError(f"{self.source}: has no tokenizer files, and text needs one")
        return tokenizer

    def logits(
        self,
        tokens: ArrayLike,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
    ) -> jax.Array:
        """Computes the logits of every position.

        Args:
          tokens: int[B, T].
          segment_ids: int[B, T]; tokens attend within their segment. One segment by default.
          positions: int[B, T]; counted within each segment by default.

        Returns:
          float32[B, T, vocabulary].
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2:
            raise JaxtuneError(f"tokens are int[batch, time], not of shape {list(tokens.shape)}")
        segments = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids)
        place = segment_positions(segments) if positions is None else jnp.asarray(positions)
        with jax.set_mesh(self.mesh):
            return self._logits(
                self.base, self.trainable, self.constants, tokens, segments, place
            )

    @functools.cached_property
    def _logits(self) -> Any:
        def compute(base: Tree, trainable: Tree, constants: Tree, *inputs: jax.Array) -> jax.Array:
            model = self.definition.bind(base, trainable, constants)
            hidden, _ = model.hidden(*inputs, self.options)
            return model.head()(hidden)

        return jax.jit(compute)

    def save_pretrained(self, directory: str | Path, dtype: str | None = None) -> Path:
        """Writes a Hugging Face checkpoint that transformers loads, the adapter merged in.

        Args:
          directory: to create.
          dtype: "bfloat16" or "float32" on disk; by default what each weight is held in.

        Returns:
          The directory.
        """
        model = self.definition.bind(self.base, self.trainable, self.constants)
        return huggingface.save(
            directory,
            self.definition,
            merge(self.base, self.trainable, self.constants),
            tokenizer=load_tokenizer(self.source),
            extra_files=_extra_files(self.source),
            dtype=None if dtype is None else jnp.dtype(dtype),
            edits=edits(model),
        )


def segment_positions(segment_ids: jax.Array) -> jax.Array:
    """Counts positions from 0 within each run of equal segment ids: int[B, T] → int32[B, T]."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1] - 1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def _extra_files(source: Path) -> Mapping[str, Path]:
    name = "generation_config.json"
    return {name: source / name} if source.is_dir() and (source / name).is_file() else {}


def load(
    path: str | Path,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    dtype: str = "bfloat16",
    *,
    revision: str = "",
    mesh: Mesh | None = None,
    attention: str = "auto",
) -> Model:
    """Loads a model, and an adapter if one is given.

    Args:
      path: a Hugging Face directory, a hub id or a .gguf file.
      adapter: a directory in PEFT's format.
      quantize: format of the weights; None keeps `dtype`.
      dtype: "bfloat16" or "float32", whatever is on disk.
      revision: of a hub id.
      mesh: where the weights go; one device by default.
      attention: attention backend; by platform by default.

    Raises:
      JaxtuneError: the checkpoint, the adapter or a setting is not usable; the message says why.
    """
    stored = None if adapter is None else read_adapter(adapter)
    method = Full() if stored is None else method_from_peft(stored)
    trains_base = False
    return load_with_method(
        path,
        method,
        stored,
        quantize=quantize,
        dtype=dtype,
        revision=revision,
        mesh=mesh,
        attention=attention,
        train_base=trains_base,
    )
