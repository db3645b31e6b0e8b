"""VeRA: frozen random matrices shared by all projections, and two trained vectors in each.

Source: Kopiczko et al., 2024 (VeRA).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.modules_to_save import saved_modules
from jaxtune.adapters.projections.peft_files import edit_tensors, from_disk, peft_config
from jaxtune.adapters.projections.slots import (
    AdapterPart,
    LinearMethod,
    SlotAdapter,
    shared_settings,
)
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import Edit, LowRank, Projection
from jaxtune.layers.tree import (
    Constant,
    Shared,
    Trainable,
    Tree,
    declaration_of,
    flatten,
    parameter,
    unflatten,
)
from jaxtune.models.definition import Definition

D_INITIAL = 0.1  # table 6 of the paper, and PEFT's default
MATRICES = ("vera_A", "vera_B")
_KEY = re.compile(r"(.+)\.vera_lambda_([bd])")


class VeraAdapter(SlotAdapter):
    """The two vectors of a projection, stacked over the layers of its block.

    `vera_A` [r, largest in] and `vera_B` [largest out, r] are shared by all projections.
    """

    def __init__(self, linear: Projection, settings: tuple[int | None, ...], dropout: float):
        self.rank = next(rank for rank in settings if rank)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        declared = declaration_of(linear.weight)
        axes, experts = declared.axes[:1], declared.experts
        self.vera_lambda_b = parameter((self.out_features,), axes, "zeros", Trainable, experts)
        self.vera_lambda_d = parameter((self.rank,), ("rank",), "ones", Trainable, experts)
        self.chosen_here = parameter((), (), "ones", Constant, experts)
        self.vera_A: Any = nnx.data(None)  # set by Vera.attach, once the largest shapes are known
        self.vera_B: Any = nnx.data(None)
        self.settings = settings
        self.dropout = dropout

    def parts(self, setting: int) -> dict[str, AdapterPart]:
        """Returns both vectors."""
        return {
            "vera_lambda_b": AdapterPart(".vera_lambda_b", (self.out_features,)),
            "vera_lambda_d": AdapterPart(".vera_lambda_d", (self.rank,)),
        }

    def start(self, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Returns zeros for b [out], so that the edit is zero, and `D_INITIAL` for d [r]."""
        del key
        return jnp.zeros(shape) if name == "vera_lambda_b" else jnp.full(shape, D_INITIAL)

    def constants(self) -> dict[str, np.ndarray]:
        """Returns [layers · experts]: 1 where the vectors are used, 0 elsewhere."""
        return {"chosen_here": self.chosen}

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Adds diag(b) B diag(d) A, with the matrices cut to the weight's shape [out, in]."""
        del weight, bias, dtype
        return Edit(
            LowRank(
                self.vera_A.get_value()[:, : self.in_features],
                self.vera_B.get_value()[: self.out_features],
                self.vera_lambda_b.get_value() * self.chosen_here.get_value()[..., None],
                self.vera_lambda_d.get_value(),
            )
        )


@dataclasses.dataclass(frozen=True)
class Vera(LinearMethod):
    """VeRA with its settings.

    Attributes:
      rank: rank of the shared matrices.
      dropout: dropout rate on the input of the low-rank branch.
      targets: modules to edit; see `match_targets`.
      modules: Hugging Face module names, set for an adapter read from disk; replaces `targets`.
    """

    name: ClassVar[str] = "vera"

    rank: int = 256
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)
    modules: tuple[str, ...] = ()

    def choose(self, modules: Mapping[str, Projection]) -> dict[str, int]:
        """Returns the rank of every target."""
        if self.modules:
            return from_disk([(name, self.rank) for name in self.modules], modules)
        return dict.fromkeys(self.select(self.targets, modules), self.rank)

    def attach(self, model: CausalLM) -> None:
        """Fills the slots; all adapters hold the same two matrices."""
        super().attach(model)
        edited = [linear for linear in model.projections().values() if linear.adapter is not None]
        shape_A = (self.rank, max(linear.in_features for linear in edited))
        shape_B = (max(linear.out_features for linear in edited), self.rank)
        vera_A, vera_B = (
            parameter(shape, (None, None), kind=Shared) for shape in (shape_A, shape_B)
        )
        for linear in edited:
            linear.adapter.vera_A, linear.adapter.vera_B = vera_A, vera_B

    def adapter(self, linear: Projection, settings: tuple[int | None, ...]) -> VeraAdapter:
        """Builds the abstract vectors."""
        return VeraAdapter(linear, settings, self.dropout)

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Draws the matrices from the seed, uniformly with PEFT's variance of 2 / fan-in."""
        trainable, constants = super().init(definition, seed)

        def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), MATRICES.index(name))
            bound = (6 / shape[-1]) ** 0.5
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        return trainable, _with_matrices(constants, draw)

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns the vectors and, once, the matrices."""
        stored = super().store(definition, trainable, constants)
        for path, value in flatten(constants):
            if path[-1] in MATRICES:
                stored.tensors[f"base_model.{path[-1]}"] = np.asarray(value, np.float32)
        return stored

    def restore_edits(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Stacks the vectors and reads the matrices.

        Raises:
          JaxtuneError: the matrices are smaller than a module needs.
        """
        trainable, constants = super().restore_edits(definition, stored)

        def read(name: str, shape: tuple[int, ...]) -> jax.Array:
            value = stored.tensors[f"base_model.{name}"]
            if value.ndim != 2 or any(n < m for n, m in zip(value.shape, shape, strict=True)):
                raise JaxtuneError(
                    f"adapter_model.safetensors: {name} has shape {list(value.shape)}, the model "
                    f"needs {list(shape)}"
                )
            return jnp.asarray(value[: shape[0], : shape[1]], jnp.float32)

        return trainable, _with_matrices(constants, read)

    def peft_config(self, definition: Definition, settings: Mapping[str, int]) -> dict[str, Any]:
        """Returns the config, with ``save_projection``: the matrices are in the file."""
        return peft_config("VERA", definition, settings) | {
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": D_INITIAL,
            "save_projection": True,
            "projection_prng_key": 0,
            "bias": "none",
            "init_weights": True,
        }


def _with_matrices(constants: Tree, make: Any) -> Tree:
    """Replaces the shared matrices by ``make(name, shape)``."""
    return unflatten(
        {
            path: make(path[-1], value.shape) if path[-1] in MATRICES else value
            for path, value in flatten(constants)
        }
    )


def from_config(section: AdapterConfig) -> Vera:
    """Returns the method that the ``adapter`` section of a config describes."""
    settings = shared_settings(section)
    return Vera(section.rank, section.dropout, tuple(section.targets), **settings)


def from_peft(stored: StoredAdapter) -> Vera:
    """Returns the method and settings of an adapter written by PEFT.

    Raises:
      JaxtuneError: an unsupported setting or tensor, or no matrices.
    """
    config = stored.config
    for name in MATRICES:
        if f"base_model.{name}" not in stored.tensors:
            raise JaxtuneError(
                f'adapter_model.safetensors: lacks "base_model.{name}"; let PEFT save the adapter '
                "with save_projection=True"
            )
        matrix = stored.tensors[f"base_model.{name}"]
        if matrix.ndim != 2 or not matrix.size or not jnp.issubdtype(matrix.dtype, jnp.floating):
            raise JaxtuneError(
                f'adapter_model.safetensors: "base_model.{name}" is {matrix.dtype} '
                f"{list(matrix.shape)}, not a matrix"
            )
    vectors = {
        key: value
        for key, value in stored.tensors.items()
        if key.removeprefix("base_model.") not in MATRICES
    }
    modules: set[str] = set()
    for key, value in edit_tensors(StoredAdapter(config, vectors), "a vector of VeRA"):
        match = _KEY.fullmatch(key)
        if match is None or value.ndim != 1:
            raise JaxtuneError(f'adapter_model.safetensors: "{key}" is not a vector of VeRA')
        modules.add(match[1])
    if not modules:
        raise JaxtuneError("adapter_model.safetensors holds no vectors of VeRA")
    rank = stored.tensors["base_model.vera_A"].shape[0]
    return Vera(
        rank,
        float(config.get("vera_dropout") or 0.0),
        modules=tuple(sorted(modules)),
        modules_to_save=saved_modules(stored),
        from_file=True,
    )
