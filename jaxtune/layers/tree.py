"""Parameter declarations, and conversion between modules and trees.

A module declares each parameter once, with `parameter`. The declaration determines initialisation,
conversion both ways, PEFT keys, target patterns, sharding, planning and error messages. Outside of
modules parameters are in plain nested dicts, named as Hugging Face names them; layers of equal
structure are stacked along a leading axis, one stack for each of the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

_Module = TypeVar("_Module", bound=nnx.Module)
Path = tuple[str, ...]
Tree = dict[str, Any]


class Weight(nnx.Variable):
    """A parameter of the base model."""


class Buffer(Weight):
    """A tensor of the checkpoint that is never trained, such as a router's correction bias."""


class Trainable(nnx.Variable):
    """A parameter that a fine-tuning method adds and trains."""


class Constant(nnx.Variable):
    """An array of a method that is neither trained nor part of the base."""


class Shared(Constant):
    """A constant that modules of all layers share: it is never stacked."""


@dataclasses.dataclass(frozen=True)
class Declaration:
    """The description of a parameter, without its values.

    Attributes:
      shape: shape in the checkpoint, of one layer and one expert.
      axes: logical axis of each dimension, for sharding.
      init: "normal", "zeros" or "ones".
      layers: (first layer, count) when stacked over blocks.
      experts: number of routed experts, when stacked over them.
      dtype: name of a fixed dtype; empty for that of the model.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    layers: tuple[int, int] | None = None
    experts: int | None = None
    dtype: str = ""

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The leading axes: layers, then experts, if stacked over them."""
        return ((self.layers[1],) if self.layers else ()) + (
            (self.experts,) if self.experts else ()
        )

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """`shape` after the leading axes."""
        return (*self.stack_shape, *self.shape)

    @property
    def stacked_axes(self) -> tuple[str | None, ...]:
        """`axes` after the leading ones."""
        layers = ("layers",) if self.layers else ()
        return (*layers, *(("experts",) if self.experts else ()), *self.axes)


def parameter(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: str = "normal",
    kind: type[nnx.Variable] = Weight,
    experts: int | None = None,
    dtype: str = "",
) -> nnx.Variable:
    """Declares a parameter [*shape]: an abstract array until a tree is bound to the module."""
    declaration = Declaration(shape, axes, init, experts=experts, dtype=dtype)
    abstract = jax.ShapeDtypeStruct(declaration.stacked_shape, dtype or jnp.float32)
    return kind(abstract, declaration=declaration)


def variables(module: nnx.Module) -> Iterator[tuple[Path, nnx.Variable]]:
    """Yields every variable of a module with its path, in a fixed order."""
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        yield tuple(str(part) for part in path), variable


def declaration_of(variable: nnx.Variable) -> Declaration:
    """Returns the declaration of a variable made by `parameter`."""
    return variable.get_metadata()["declaration"]


def stack(module: _Module, first: int, count: int) -> _Module:
    """Stacks the abstract module of one layer over the `count` layers from layer `first` on."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable) and not isinstance(variable, Shared):
            declaration = dataclasses.replace(declaration_of(variable), layers=(first, count))
            variable.set_metadata("declaration", declaration)
            value = variable.get_value()
            variable.set_value(jax.ShapeDtypeStruct(declaration.stacked_shape, value.dtype))
    return module


def flatten(tree: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields the leaves of a nested dict with their paths; only mappings are inner nodes."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), value


def unflatten(leaves: Mapping[Path, Any]) -> Tree:
    """Builds the nested dict with these leaves."""
    tree: Tree = {}
    for path, value in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Merges nested dicts; later leaves replace earlier ones of the same path."""
    return unflatten({path: leaf for tree in trees for path, leaf in flatten(tree)})


def bind(graphdef: Any, *trees: Mapping[str, Any]) -> Any:
    """Returns the module of `graphdef` with the arrays of these trees."""

    def restore_indices(node: Any) -> Any:
        # NNX addresses the elements of lists by integers; plain trees have string keys only.
        if not isinstance(node, Mapping):
            return node
        return {int(k) if k.isdigit() else k: restore_indices(v) for k, v in node.items()}

    return nnx.merge(graphdef, restore_indices(merge(*trees)))


def layer_names(path: Path, declaration: Declaration) -> list[str]:
    """Returns the Hugging Face names of a stacked leaf's parts, in the order of its leading axes.

    ``("model", "layers", "1", "mlp", …)`` with layers (3, 2) gives ``model.layers.3.mlp.…`` and
    ``model.layers.4.mlp.…``; a leaf over experts has a name for each of them,
    ``….mlp.experts.0.…`` and so on; a leaf that is not stacked has one name.
    """
    if declaration.experts is not None:
        expert = path.index("experts") + 1
        one = dataclasses.replace(declaration, experts=None)
        each = [
            layer_names((*path[:expert], str(i), *path[expert:]), one)
            for i in range(declaration.experts)
        ]
        return [name for layer in zip(*each, strict=True) for name in layer]
    if declaration.layers is None:
        return [".".join(path)]
    first, count = declaration.layers
    index = path.index("layers") + 1
    return [".".join((*path[:index], str(first + i), *path[index + 1 :])) for i in range(count)]
