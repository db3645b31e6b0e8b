"""An abstract model with a description of each parameter, and its three trees.

``base`` is frozen, ``trainable`` is differentiated and optimized, and ``constants`` are arrays of a
method that are neither. In full fine-tuning the weights of the base are trainable.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import Blocks, CausalLM
from jaxtune.layers.linear import Projection
from jaxtune.layers.tree import (
    Buffer,
    Constant,
    Declaration,
    Path,
    Trainable,
    Tree,
    Weight,
    bind,
    declaration_of,
    flatten,
    layer_names,
    unflatten,
    variables,
)
from jaxtune.parallel.mesh import named_sharding
from jaxtune.parallel.rules import RULES, even_spec
from jaxtune.quant import Format, QuantizedWeight

Kind = Literal["base", "trainable", "constants"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a model.

    Attributes:
      kind: the tree that holds it.
      declaration: its shape, axes and initialiser.
      dtype: in memory; for a quantized weight the dtype of its dequantized export.
      in_checkpoint: whether it belongs to the base model instead of a method.
      format: weight format of a quantized weight; None for a plain one.
    """

    kind: Kind
    declaration: Declaration
    dtype: Any
    in_checkpoint: bool
    format: Format | None = None

    @property
    def stored_as(self) -> str:
        """Name of the format of a quantized weight, else of the dtype."""
        return str(self.dtype) if self.format is None else self.format.name

    @property
    def nbytes(self) -> int:
        """Size of the whole stack in bytes."""
        shape = self.declaration.shape
        if self.format is None:
            each = math.prod(shape) * self.dtype.itemsize
        else:
            each = self.format.nbytes(as_matrix(shape))
        return each * math.prod(self.declaration.stack_shape)

    def abstract(self, mesh: Mesh | None = None) -> Any:
        """Returns a ShapeDtypeStruct, or a `QuantizedWeight` of them; with shardings on a mesh."""
        declaration, shape = self.declaration, self.declaration.stacked_shape
        if self.format is None:
            sharding = named_sharding(mesh, declaration.stacked_axes, shape) if mesh else None
            return jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)
        matrix, parts = as_matrix(declaration.shape), {}
        weight = QuantizedWeight({}, self.format, matrix, declaration.axes)
        lead = declaration.stack_shape
        for name, part in self.format.parts(matrix).items():
            shape = (*lead, *part.shape)
            axes = (*declaration.stacked_axes[: len(lead)], *weight.part_axes(name))
            sharding = NamedSharding(mesh, even_spec(axes, shape, mesh.shape)) if mesh else None
            parts[name] = jax.ShapeDtypeStruct(shape, part.dtype, sharding=sharding)
        return dataclasses.replace(weight, parts=parts)


def check_experts(definition: Definition, mesh_shape: Mapping[str, int]) -> None:
    """Checks that the mesh divides the experts of a layer evenly.

    Args:
      definition: definition of the model.
      mesh_shape: devices along each mesh axis.

    Raises:
      JaxtuneError: it does not; the message lists sizes that do.
    """
    shares = mesh_shape["expert"]
    for experts in {leaf.declaration.experts or 0 for leaf in definition.leaves.values()}:
        if experts % shares:
            raise JaxtuneError(
                f"mesh.expert={shares} does not divide the {experts} experts of a layer "
                f"(n_routed_experts): take {_divisors(experts)}"
            )


def _divisors(number: int) -> str:
    found = [str(n) for n in range(1, min(number, 1024) + 1) if number % n == 0]
    return ", ".join(found[:8]) + (", …" if len(found) > 8 else "")


def undivided(definition: Definition, mesh_shape: Mapping[str, int]) -> list[str]:
    """Returns a line for each weight dimension that its mesh axis does not divide.

    Each device holds such a weight whole along this axis, which costs memory and changes no result.

    Args:
      definition: definition of the model.
      mesh_shape: devices along each mesh axis.
    """
    found: dict[tuple[str, str, int], list[str]] = {}
    for path, leaf in definition.in_checkpoint().items():
        declaration = leaf.declaration
        for axis, size in zip(declaration.axes, declaration.shape, strict=True):
            for name in RULES[axis] if axis else ():
                if size % mesh_shape[name]:
                    found.setdefault((name, axis or "", size), []).append(path[-2])
    lines = []
    for (name, axis, size), modules in found.items():
        shares = mesh_shape[name]
        line = (
            f"mesh.{name}={shares} does not divide {size}: each device holds "
            f"{', '.join(dict.fromkeys(modules))} whole along this axis"
        )
        if axis == "vocab":
            line += f" (`jaxtune convert --vocab-size {size + -size % shares}` makes it divisible)"
        else:
            line += f" ({_divisors(size)} divide it)"
        lines.append(line)
    return lines


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns a shape of two dimensions as (rows, columns)."""
    rows, columns = shape
    return rows, columns


class Definition:
    """The static description of a model and its trees, without values.

    Other packages use a model through these properties and do not reach into `module`.

    Attributes:
      config: the content of config.json.
      module: the abstract model with its adapters; read-only.
      leaves: every array by path.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        model: CausalLM,
        dtype: DTypeLike,
        trains: Callable[[str], bool] = lambda name: False,
        formats: Callable[[Path], Format | None] = lambda path: None,
    ):
        """Describes an abstract model.

        Args:
          config: the content of config.json.
          model: the abstract module, with its adapters attached.
          dtype: dtype of frozen weights; trained ones are float32.
          trains: returns whether a base weight is trained, by its name in the first layer of its
            blocks, which are trained or frozen together.
          formats: returns the quantized format of a frozen base weight by its path, or None.
        """
        self.config = dict(config)
        self.module = model
        self.leaves: dict[Path, Leaf] = {}
        # The type of a variable decides its tree, except that a base weight may be trained too.
        for path, variable in variables(model):
            kind: Kind = "base"
            name = layer_names(path, declaration_of(variable))[0]
            trained = trains(name) and not isinstance(variable, Buffer)
            if isinstance(variable, Trainable) or trained:
                kind = "trainable"
            elif isinstance(variable, Constant):
                kind = "constants"
            declaration = declaration_of(variable)
            held = declaration.dtype or dtype if kind == "base" else jnp.float32
            in_checkpoint = isinstance(variable, Weight)
            form = formats(path) if kind == "base" and in_checkpoint else None
            self.leaves[path] = Leaf(kind, declaration, jnp.dtype(held), in_checkpoint, form)
        self._graphdef = nnx.graphdef(model)

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary: rows of the embedding."""
        return self.module.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.module.hidden_size

    @property
    def blocks(self) -> tuple[Blocks, ...]:
        """The blocks in order."""
        return self.module.decoder.blocks

    @property
    def layer_count(self) -> int:
        """Number of layers."""
        return sum(blocks.count for blocks in self.blocks)

    @property
    def mixture_layers(self) -> list[int]:
        """Numbers of the layers with routed experts."""
        mixtures = [blocks for blocks in self.blocks if blocks.layer.mixture is not None]
        return [layer for _, first, count in mixtures for layer in range(first, first + count)]

    @property
    def attention(self) -> Any:
        """The attention of the first layer: all layers of a model have the same kind."""
        return self.blocks[0].layer.self_attn

    @property
    def reserved(self) -> int:
        """Number of positions at the start of every segment that virtual tokens occupy."""
        return self.module.decoder.reserved

    @property
    def prompt(self) -> Any:
        """The module that returns the embeddings of virtual tokens, or None."""
        return self.module.decoder.prompt

    @property
    def prefix(self) -> Any:
        """The module of the prefix that layers share, or None without a prefix."""
        return self.module.decoder.prefix

    @property
    def trained_rows(self) -> dict[str, Any]:
        """The modules of trained rows, "embed_tokens" and "lm_head"; None where there is none."""
        embedding = self.module.decoder.embed_tokens
        return {"embed_tokens": embedding.adapter, "lm_head": self.module.lm_head_rows}

    @property
    def has_prefix(self) -> bool:
        """Whether trained keys and values come before every segment."""
        return self.prefix is not None

    def projections(self) -> dict[Path, Projection]:
        """Returns every projection by path, routers included, with one entry per block."""
        return self.module.projections()

    def of_kind(self, *kinds: Kind) -> dict[Path, Leaf]:
        """Returns the leaves of these trees."""
        return {path: leaf for path, leaf in self.leaves.items() if leaf.kind in kinds}

    def in_checkpoint(self) -> dict[Path, Leaf]:
        """Returns the leaves that belong to the base model's checkpoint."""
        return {path: leaf for path, leaf in self.leaves.items() if leaf.in_checkpoint}

    def abstract(self, kind: Kind, mesh: Mesh | None = None) -> Tree:
        """Returns a tree of ShapeDtypeStructs, with shardings if a mesh is given."""
        return unflatten({path: leaf.abstract(mesh) for path, leaf in self.of_kind(kind).items()})

    def bind(self, *trees: Mapping[str, Any]) -> CausalLM:
        """Returns the model with the arrays of these trees."""
        return bind(self._graphdef, *trees)

    def split(self, tree: Mapping[str, Any]) -> dict[Kind, Tree]:
        """Sorts the leaves of one tree into the three trees."""
        parts: dict[Kind, dict[Path, Any]] = {"base": {}, "trainable": {}, "constants": {}}
        for path, value in flatten(tree):
            parts[self.leaves[path].kind][path] = value
        return {kind: unflatten(leaves) for kind, leaves in parts.items()}


def initialize(definition: Definition, key: jax.Array, std: float = 0.02) -> Tree:
    """Draws random values for every base weight: for benchmarks and tests, not for training.

    Args:
      definition: definition of the model.
      key: random key, a scalar.
      std: standard deviation of the normal initialiser.
    """

    def draw(path: Path, leaf: Leaf, key: jax.Array) -> jax.Array:
        shape = leaf.declaration.stacked_shape
        if leaf.declaration.init == "normal":
            return (jax.random.normal(key, shape, jnp.float32) * std).astype(leaf.dtype)
        fill = {"zeros": 0.0, "ones": 1.0}[leaf.declaration.init]
        return jnp.full(shape, fill, leaf.dtype)

    leaves = definition.in_checkpoint()
    keys = jax.random.split(key, len(leaves))
    return unflatten(
        {p: draw(p, leaf, k) for (p, leaf), k in zip(leaves.items(), keys, strict=True)}
    )
