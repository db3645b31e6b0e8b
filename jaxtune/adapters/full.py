"""Full fine-tuning: all weights, except frozen ones, are trained in float32."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from typing import ClassVar

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.config import AdapterConfig
from jaxtune.errors import BAD_PATTERN, JaxtuneError, closest
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.tree import Tree, declaration_of, layer_names, variables
from jaxtune.models.definition import Definition

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[\w.]+")
# A dot that stands for one character of any kind.
_DOT = re.compile(r"(?<!\\)\.(?![*+?{])")


@dataclasses.dataclass(frozen=True)
class Full(Method):
    """Trains the base model itself.

    Attributes:
      freeze: names of modules or weights, whose parts are compared exactly, or regular
        expressions; a weight is frozen if one matches the start of its name.
    """

    name: ClassVar[str] = "full"
    has_adapter: ClassVar[bool] = False

    freeze: tuple[str, ...] = ()

    def attach(self, model: CausalLM) -> None:
        """Splits blocks so that each weight is trained in all layers of its block or in none.

        A block is one stacked array per weight, and an array is in either the trainable or the
        frozen tree. A new block begins wherever a layer's set of frozen weights differs from that
        of the layer before it.

        Raises:
          JaxtuneError: an expression matches nothing, or only some experts of a layer.
        """
        names: list[str] = []
        frozen: dict[int, set[str]] = {}
        for path, variable in variables(model):
            declared = declaration_of(variable)
            stacked = layer_names(path, declared)
            names += stacked
            first, count = declared.layers or (0, 1)
            experts = len(stacked) // count  # names per layer: one, or one for each expert
            for layer in range(count):
                in_layer = stacked[layer * experts : (layer + 1) * experts]
                trained = {self.trains(name) for name in in_layer}
                if len(trained) > 1:
                    raise JaxtuneError(
                        f"adapter.freeze: {in_layer[0]} is frozen in some experts of its "
                        "layer and trained in others"
                    )
                if declared.layers and trained == {False}:
                    frozen.setdefault(first + layer, set()).add(".".join(path[3:]))
        for pattern in self.freeze:
            _check_pattern(pattern, names)
        if not any(self.trains(name) for name in names):
            raise JaxtuneError("adapter.freeze leaves nothing to train")
        last = sum(blocks.count for blocks in model.decoder.blocks)
        model.decoder.split_blocks(
            [i for i in range(1, last) if frozen.get(i, set()) != frozen.get(i - 1, set())]
        )

    def trains(self, name: str) -> bool:
        """Returns whether the weight is not frozen."""
        return not any(_matches(pattern, name) for pattern in self.freeze)

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Adds no arrays of its own."""
        del definition, seed
        return {}, {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Raises: full fine-tuning trains the model itself."""
        raise JaxtuneError("adapter.method=full has no adapter to store: export it as merged")

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Raises: full fine-tuning has no adapter."""
        raise JaxtuneError("adapter.method=full has no adapter to restore")


def _matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern of `Full.freeze` matches a weight's name."""
    if _NAME.fullmatch(pattern):
        return f"{name}.".startswith(f"{pattern.removesuffix('.')}.")
    return re.match(pattern, name) is not None


def _check_pattern(pattern: str, names: list[str]) -> None:
    """Raises if a pattern matches nothing; warns if its dots match more than dots.

    Raises:
      JaxtuneError: the pattern matches the start of no name.
    """
    found = [name for name in names if _matches(pattern, name)]
    if not found:
        parts = {name[: match.end()] for name in names for match in re.finditer(r"\w+", name)}
        raise JaxtuneError(
            f'adapter.freeze: "{pattern}" matches the start of no name{closest(pattern, parts)}'
        )
    literal = _DOT.sub(r"\.", pattern)
    more = [name for name in found if not re.match(literal, name)]
    if more and len(more) < len(found) and not _NAME.fullmatch(pattern):
        _warn(
            f'adapter.freeze: "{pattern}" freezes {len(found)} weights, {len(more)} of which only '
            f'because "." matches any character, such as {more[0]}; "{literal}" leaves them out'
        )


@functools.cache
def _warn(message: str) -> None:
    """Logs a warning, once per process: a model is defined several times in a run."""
    _log.warning("%s", message)


def from_config(section: AdapterConfig) -> Full:
    """Returns the method that the ``adapter`` section of a config describes.

    Raises:
      JaxtuneError: an invalid regular expression.
    """
    for pattern in section.freeze:
        try:
            re.compile(pattern)
        except BAD_PATTERN as error:
            raise JaxtuneError(
                f'adapter.freeze: "{pattern}" is not a valid regular expression: {error}'
            ) from None
    return Full(tuple(section.freeze))
