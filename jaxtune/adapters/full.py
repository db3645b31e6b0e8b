"""Full fine-tuning: every weight is trained, as a float32 master."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxtune.adapters.method import Method, Stored
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Path, Tree
from jaxtune.models.definition import Definition


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains the base model itself."""

    name: ClassVar[str] = "full"
    has_adapter: ClassVar[bool] = False

    def attach(self, model: CausalLM) -> None:
        """Adds nothing."""

    def trains(self, path: Path) -> bool:
        """Says yes to every weight."""
        del path
        return True

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Adds no arrays of its own."""
        del definition, seed
        return {}, {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> Stored:
        """Refuses: what was trained is the model."""
        raise JaxtuneError("adapter.method=full has no adapter to store: export it as merged")

    def restore(self, definition: Definition, stored: Stored) -> tuple[Tree, Tree]:
        """Refuses: there is no such adapter."""
        raise JaxtuneError("adapter.method=full has no adapter to restore")


def from_config(section: Any) -> Full:
    """Returns the method; it has no settings."""
    del section
    return Full()
