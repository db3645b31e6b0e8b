"""No method: a model to be looked at, and not trained."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxtune.adapters.method import Method, Stored
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition


@dataclasses.dataclass(frozen=True)
class Bare(Method):
    """The base model alone, where a method is asked for."""

    name: ClassVar[str] = "none"
    has_adapter: ClassVar[bool] = False

    def attach(self, model: CausalLM) -> None:
        """Leaves the model as it is."""

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Adds no arrays."""
        del definition, seed
        return {}, {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> Stored:
        """Refuses: nothing is trained."""
        raise JaxtuneError("a model without a method has no adapter to store")

    def restore(self, definition: Definition, stored: Stored) -> tuple[Tree, Tree]:
        """Refuses: there is no such adapter."""
        raise JaxtuneError("a model without a method has no adapter to restore")
