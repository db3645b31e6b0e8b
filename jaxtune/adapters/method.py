"""The interface of fine-tuning methods. A new one is one file and one line in the registry."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition

# Suffix of PEFT's key for a copy of the frozen head, which it stores with the head's edit.
BASE_COPY = ".base_layer.weight"


class StoredAdapter(NamedTuple):
    """An adapter as PEFT stores it.

    Attributes:
      config: the content of adapter_config.json.
      tensors: content of adapter_model.safetensors by key, in the shapes of PEFT's files.
      encoder: tensors of encoder.safetensors, the network that computed `tensors`, from which
        training resumes. None where there is no network, or where it was not read.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    encoder: dict[str, np.ndarray] | None = None

    def base_copies(self) -> dict[str, np.ndarray]:
        """Returns copies of frozen weights [out, in] stored with edits, by Hugging Face name."""
        return {
            key.removeprefix("base_model.model.").replace(BASE_COPY, ".weight"): value
            for key, value in self.tensors.items()
            if key.endswith(BASE_COPY)
        }


def is_adapterhub(config: Mapping[str, Any]) -> bool:
    """Returns whether an adapter_config.json is AdapterHub's rather than PEFT's."""
    return "peft_type" not in config and "config" in config


class BaseEdit(abc.ABC):
    """Changes weights of the base while they stream in, before any rounding or quantization.

    Attributes:
      names: Hugging Face names of the weights to change.
    """

    names: Collection[str]

    @abc.abstractmethod
    def __call__(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Returns what to load in place of a weight, both float32 [out, in]."""


class Start(NamedTuple):
    """A fresh start of a method.

    Attributes:
      base_edit: what `base_edit` returned, after all weights have streamed in.
    """

    base_edit: BaseEdit | None


class Method(abc.ABC):
    """A fine-tuning method with its settings.

    Attributes:
      name: value of ``adapter.method`` that selects the method.
      has_adapter: whether trained arrays are stored apart from the model.
      can_merge: whether trained arrays can be merged into the model's weights.
      files: owner of the file format that `store` produces, for messages.
      edits_base: whether `base_edit` changes the base during training, so that the stored adapter,
        which applies to the original base, differs from the trained arrays.
      dropout: dropout rate during training.
    """

    name: ClassVar[str]
    has_adapter: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True
    files: ClassVar[str] = "PEFT's"
    edits_base: ClassVar[bool] = False
    dropout: float = 0.0

    @abc.abstractmethod
    def attach(self, model: CausalLM) -> None:
        """Fills the slots of an abstract model with the method's modules.

        Raises:
          JaxtuneError: the model lacks a target.
        """

    def trains(self, name: str) -> bool:
        """Returns whether the base weight with this Hugging Face name is trained."""
        del name
        return False

    def start(self, tokenizer: Any, embeddings: Callable[[], np.ndarray]) -> StoredAdapter | None:
        """Returns an initial adapter computed from the base model; None for a random start.

        Args:
          tokenizer: the base model's tokenizer, or None.
          embeddings: reads the base model's token embeddings [vocabulary, hidden].
        """
        del tokenizer, embeddings

    def with_tokenizer(self, tokenizer: Any) -> Method:
        """Returns a copy with the settings that depend on the tokenizer filled in.

        Args:
          tokenizer: the base model's tokenizer, or None.

        Raises:
          JaxtuneError: the tokenizer lacks a token that the method trains.
        """
        del tokenizer
        return self

    def with_stored(self, stored: StoredAdapter) -> Method:
        """Returns a copy with the settings that only a stored adapter holds, such as token ids.

        Args:
          stored: the result of `store` that is about to be restored.
        """
        del stored
        return self

    def with_scores(self, measure: Callable[[], ExpertScores]) -> Method:
        """Returns a copy with the settings that depend on the routing of the training data.

        Args:
          measure: scores the base model's experts on the training data, which may take minutes.
        """
        del measure
        return self

    @abc.abstractmethod
    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Returns the initial (trainable, constants), without trained base weights."""

    def base_edit(self, definition: Definition, stored: StoredAdapter | None) -> BaseEdit | None:
        """Returns the edit to apply to the base's weights while they stream in, or None.

        The result must depend on the weights alone, since a resumed run streams the same
        checkpoint again.

        Args:
          definition: definition of the model.
          stored: the adapter that is restored over this base; None for a fresh start.
        """
        del definition, stored
        return None

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Fills in the arrays that depend on the weights of the base.

        Args:
          definition: definition of the model.
          weights: weights of the base as loaded; frozen ones may be quantized.
          trees: (trainable, constants) from `init` or `restore`.
          start: result of a fresh start; None after `restore`.

        Returns:
          (trainable, constants).
        """
        del definition, weights, start
        return trees

    @abc.abstractmethod
    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns the adapter in PEFT's format.

        Raises:
          JaxtuneError: the method has no adapter of its own.
        """

    def outline(self, definition: Definition) -> StoredAdapter:
        """Returns an adapter as `store` does, with zeros that take no memory for its values.

        Raises:
          JaxtuneError: the method has no adapter of its own.
        """
        trainable, constants = (
            jax.tree.map(
                lambda like: np.broadcast_to(np.float32(0), like.shape), definition.abstract(kind)
            )
            for kind in ("trainable", "constants")
        )
        return self.store(definition, trainable, constants)

    @abc.abstractmethod
    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Returns (trainable, constants) of an adapter written by `store` or by PEFT."""

    def restore_edits(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Returns the trees of `restore` without the arrays that `whole_weights` returns."""
        return self.restore(definition, stored)

    def whole_weights(
        self, definition: Definition, stored: StoredAdapter
    ) -> Mapping[str, np.ndarray]:
        """Returns the weights that an adapter replaces, by Hugging Face name.

        They have the shapes of the base's weights, and are views of the adapter's file if possible.

        Args:
          definition: definition of the model.
          stored: the adapter.

        Raises:
          JaxtuneError: a weight is missing or has another shape.
        """
        del definition, stored
        return {}


def owned(value: np.ndarray) -> np.ndarray:
    """Returns a copy of an array [...], or the array itself if it is the zeros of an outline."""
    repeated = value.ndim > 0 and not any(value.strides)
    return value if repeated else value.copy()


@dataclasses.dataclass(frozen=True)
class NoMethod(Method):
    """The base model alone, without any fine-tuning method."""

    name: ClassVar[str] = "none"
    has_adapter: ClassVar[bool] = False

    def attach(self, model: CausalLM) -> None:
        """Leaves the model unchanged."""

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Adds no arrays."""
        del definition, seed
        return {}, {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Raises: nothing is trained."""
        raise JaxtuneError("a model without a method has no adapter to store")

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Raises: there is no adapter."""
        raise JaxtuneError("a model without a method has no adapter to restore")
