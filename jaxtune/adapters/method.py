"""What a fine-tuning method is. A new one is one file and one line in the registry."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition

# How PEFT ends the key of the frozen weight of a head, which it stores beside the head's edit.
BASE_COPY = ".base_layer.weight"


class StoredAdapter(NamedTuple):
    """An adapter as PEFT stores it.

    Attributes:
      config: the content of adapter_config.json.
      tensors: of adapter_model.safetensors, by key; shapes are those of PEFT's files.
      encoder: tensors of encoder.safetensors, the network that computed `tensors`, from which
        training resumes. None where there is no network, or where it was not read.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    encoder: dict[str, np.ndarray] | None = None

    def base_copies(self) -> dict[str, np.ndarray]:
        """Returns the frozen weights, each [out, in], that are stored beside edits, by HF name."""
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
      name: as ``adapter.method`` calls it.
      has_adapter: whether what it trains is stored apart from the model.
      can_merge: whether the model's own weights can take in what it trains.
      files: whose files of an adapter `store` gives.
      edits_base: whether it trains beside a base that `base_edit` has changed, so that what is
        stored for other tools to load is not what was trained.
      dropout: whether anything is dropped while training, and how much.
    """

    name: ClassVar[str]
    has_adapter: ClassVar[bool] = True
    can_merge: ClassVar[bool] = True
    files: ClassVar[str] = "PEFT's"
    edits_base: ClassVar[bool] = False
    dropout: float = 0.0

    @abc.abstractmethod
    def attach(self, model: CausalLM) -> None:
        """Puts the method's modules into the slots of an abstract model.

        Raises:
          JaxtuneError: a target that the model does not have.
        """

    def trains(self, name: str) -> bool:
        """Returns whether the base weight of this Hugging Face name is trained."""
        del name
        return False

    def start(self, tokenizer: Any, embeddings: Callable[[], np.ndarray]) -> StoredAdapter | None:
        """Returns an adapter to start from that takes the base model to make; None draws one.

        Args:
          tokenizer: of the base model; None where it has none.
          embeddings: reads those of its tokens, [vocabulary, hidden].
        """
        del tokenizer, embeddings

    def with_tokenizer(self, tokenizer: Any) -> Method:
        """Returns the method with what depends on the tokenizer, where anything does.

        Args:
          tokenizer: of the base model; None where it has none.

        Raises:
          JaxtuneError: the method asks for tokens that the tokenizer does not have.
        """
        del tokenizer
        return self

    def with_stored(self, stored: StoredAdapter) -> Method:
        """Returns the method with what a stored adapter of its own says that a config cannot.

        Args:
          stored: what `store` gave, and what is to be restored.
        """
        del stored
        return self

    def with_scores(self, measure: Callable[[], ExpertScores]) -> Method:
        """Returns the method with what depends on how the data is routed, where anything does.

        Args:
          measure: scores the experts of the base model on the training data; it may take long.
        """
        del measure
        return self

    @abc.abstractmethod
    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Returns (trainable, constants) at the start, without trained base weights."""

    def base_edit(self, definition: Definition, stored: StoredAdapter | None) -> BaseEdit | None:
        """Returns what changes weights of the base while they stream in, or None.

        The result must depend on the weights alone, since a resumed run streams the same
        checkpoint again.

        Args:
          definition: of the model.
          stored: what `store` gave of the adapter that is to be restored beside this base; None
            at a fresh start.
        """
        del definition, stored
        return None

    def complete(
        self, definition: Definition, weights: Tree, trees: tuple[Tree, Tree], start: Start | None
    ) -> tuple[Tree, Tree]:
        """Fills in what depends on the weights of the base.

        Args:
          definition: of the model.
          weights: of the base, as loaded; frozen ones may be quantized.
          trees: (trainable, constants) of `init` or `restore`.
          start: of a fresh start; None after `restore`.

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

    @abc.abstractmethod
    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Returns (trainable, constants) of an adapter that `store` or PEFT wrote."""


@dataclasses.dataclass(frozen=True)
class NoMethod(Method):
    """The base model alone, where a method is asked for."""

    name: ClassVar[str] = "none"
    has_adapter: ClassVar[bool] = False

    def attach(self, model: CausalLM) -> None:
        """Leaves the model as it is."""

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Adds no arrays."""
        del definition, seed
        return {}, {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Refuses: nothing is trained."""
        raise JaxtuneError("a model without a method has no adapter to store")

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Refuses: there is no such adapter."""
        raise JaxtuneError("a model without a method has no adapter to restore")
