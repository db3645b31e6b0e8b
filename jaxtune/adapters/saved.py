"""Modules trained as they are and stored whole beside an adapter: PEFT's modules_to_save."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtune.adapters.method import Stored
from jaxtune.errors import JaxtuneError, closest
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Declaration, Path, layer_names, variables
from jaxtune.models.definition import Definition


def saved_modules(stored: Stored) -> tuple[str, ...]:
    """Returns the modules that an adapter on disk stores whole."""
    return tuple(stored.config.get("modules_to_save") or ())


def check_saved(model: CausalLM, saved: Sequence[str]) -> None:
    """Looks the modules to train whole up.

    Raises:
      JaxtuneError: one is not there, is of one layer, or is embedding and head at once.
    """
    modules = {path[:-1] for path, _ in variables(model)}
    for name in saved:
        if any(part.isdigit() for part in name.split(".")):
            raise JaxtuneError(
                f"adapter.modules_to_save: {name} is of one layer; what is saved is saved of all"
            )
        if model.lm_head is None and name.split(".")[-1] in ("lm_head", "embed_tokens"):
            raise JaxtuneError(
                f"adapter.modules_to_save: {name} is embedding and head at once in this model "
                "(tie_word_embeddings): untie the checkpoint first"
            )
        if not any(".".join(path).endswith(name) for path in modules):  # as PEFT compares
            known = sorted({path[-1] for path in modules})
            raise JaxtuneError(
                f'adapter.modules_to_save: "{name}" matches no module{closest(name, known)}'
            )


def saved_arrays(definition: Definition) -> Iterator[tuple[Path, list[str], Declaration]]:
    """Yields what is trained of the base: path, names in the checkpoint, declaration."""
    for path, leaf in definition.of_kind("trainable").items():
        if leaf.in_checkpoint:
            yield path, layer_names(path, leaf.declaration), leaf.declaration
