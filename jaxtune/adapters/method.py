"""What a fine-tuning method is. A new one is one file and one line in the registry."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Path, Tree
from jaxtune.models.definition import Definition


class Stored(NamedTuple):
    """An adapter as PEFT stores it.

    Attributes:
      config: the content of adapter_config.json.
      tensors: of adapter_model.safetensors, by key.
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Method(abc.ABC):
    """A fine-tuning method with its settings."""

    name: ClassVar[str]

    @abc.abstractmethod
    def attach(self, model: CausalLM) -> None:
        """Puts the method's modules into the slots of an abstract model.

        Raises:
          JaxtuneError: a target that the model does not have.
        """

    def trains(self, path: Path) -> bool:
        """Says whether the base weight at `path` is trained."""
        del path
        return False

    @abc.abstractmethod
    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Returns (trainable, constants) at the start, without trained base weights."""

    @abc.abstractmethod
    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> Stored:
        """Returns the adapter in PEFT's format.

        Raises:
          JaxtuneError: the method has no adapter of its own.
        """

    @abc.abstractmethod
    def restore(self, definition: Definition, stored: Stored) -> tuple[Tree, Tree]:
        """Returns (trainable, constants) of an adapter that `store` or PEFT wrote."""
