"""Common parts of methods that edit projections: filling slots, stacking layers, PEFT's keys.

A method defines the settings of each chosen module, the trained arrays of an adapter with these
settings (its parts) and PEFT's config. Everything else is in this module.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxtune.adapters.method import Method, StoredAdapter, owned
from jaxtune.adapters.projections.modules_to_save import (
    check_saved,
    is_saved,
    read_saved,
    saved_arrays,
)
from jaxtune.adapters.projections.peft_files import PREFIX
from jaxtune.adapters.targets import (
    in_layers,
    match_targets,
    module_names,
    parse_layers,
)
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import Edit, Projection
from jaxtune.layers.noise import dropout
from jaxtune.layers.tree import (
    Declaration,
    Path,
    Tree,
    declaration_of,
    flatten,
    merge,
    stack,
    unflatten,
)
from jaxtune.models.definition import Definition

if TYPE_CHECKING:
    from jaxtune.adapters.projections.factors import Factor

Setting: TypeAlias = "Factor | bool | int | str"
"""The settings of one module; each method has a type of its own."""


@dataclasses.dataclass(frozen=True)
class AdapterPart:
    """A trained array of one projection of one layer (and expert).

    Attributes:
      key: suffix after the module's name in PEFT's file.
      shape: shape in memory, without padding.
      file_shape: shape in the file, if it differs.
    """

    key: str
    shape: tuple[int, ...]
    file_shape: tuple[int, ...] | None = None


class SlotAdapter(nnx.Module, abc.ABC):
    """The module in the adapter slot of a projection, stacked over the layers of its block.

    Arrays are [layers, …] or [layers, experts, …]. Layers (and experts) that the method leaves
    alone occupy entries all the same, which `constants` disables.

    Attributes:
      settings: one entry per layer (and expert), in the order of the leading axes; None where the
        method leaves the projection alone.
      dropout: dropout rate on the input of a low-rank branch.
    """

    settings: tuple[Setting | None, ...]
    dropout: float = 0.0

    @abc.abstractmethod
    def parts(self, setting: Setting) -> dict[str, AdapterPart]:
        """Returns the trained arrays of a layer with this setting, by attribute."""

    @abc.abstractmethod
    def start(self, name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        """Returns the initial value of the trained array `name`, of the given stacked shape."""

    @abc.abstractmethod
    def constants(self) -> dict[str, np.ndarray]:
        """Returns constants that follow from settings, each [layers · experts], by attribute."""

    @abc.abstractmethod
    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Returns the edit of a weight [out, in]; see `LinearAdapter`."""

    def derived(self, weight: Any) -> dict[str, jax.Array]:
        """Returns the constants of one layer that follow from its frozen weight, by attribute.

        Args:
          weight: [out, in], plain or quantized.
        """
        del weight
        return {}

    def drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Applies dropout to the inputs [..., in] of the low-rank branch; none without a key."""
        return dropout(x, self.dropout, key)

    def edits_bias(self, linear: Projection) -> bool:
        """Returns whether an edit of this projection has a bias."""
        del linear
        return False

    @property
    def chosen(self) -> np.ndarray:
        """float32 [layers · experts]: 1 where the method edits the projection, 0 elsewhere."""
        return np.array([setting is not None for setting in self.settings], np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearMethod(Method):
    """A method that puts a `SlotAdapter` into the slots of chosen projections.

    Attributes:
      layers: layers to edit; empty for all.
      modules_to_save: suffixes of names of modules that are trained and stored in full, with all
        modules they contain.
      from_file: whether the settings come from an adapter on disk rather than from a config.
    """

    layers: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    from_file: bool = False

    def key(self, option: str, setting: str = "") -> str:
        """Returns the name of a setting for messages.

        Args:
          option: its name in the ``adapter`` section of a config.
          setting: its name in adapter_config.json, if it differs.
        """
        if self.from_file:
            return f'adapter_config.json: "{setting or option}"'
        return f"adapter.{option}"

    @abc.abstractmethod
    def choose(self, modules: Mapping[str, Projection]) -> Mapping[str, Setting]:
        """Returns the settings of the modules to edit, given all projections by name."""

    @abc.abstractmethod
    def adapter(self, linear: Projection, settings: tuple[Setting | None, ...]) -> SlotAdapter:
        """Builds the abstract adapter of a projection, for one layer of its block.

        Args:
          linear: the projection.
          settings: settings of every layer (and expert) of the block; None for unedited ones.
        """

    @abc.abstractmethod
    def peft_config(
        self, definition: Definition, settings: Mapping[str, Setting]
    ) -> dict[str, Any]:
        """Returns adapter_config.json, given the settings by Hugging Face module name."""

    def select(
        self, targets: Sequence[str], modules: Iterable[str], key: str = "adapter.targets"
    ) -> list[str]:
        """Returns the modules that match the targets of a setting, in the order of `modules`."""
        names = in_layers(modules, self.layers)
        matched = match_targets(targets, names, key)
        return [name for name in names if name in matched]

    def trains(self, name: str) -> bool:
        """Returns whether the weight belongs to a module in modules_to_save."""
        return is_saved(name.rpartition(".")[0], self.modules_to_save)

    def attach(self, model: CausalLM) -> None:
        """Fills the adapter slot of every chosen projection.

        Raises:
          JaxtuneError: a target is missing or trained twice, or a router would need dropout or a
            bias.
        """
        check_saved(model, self.modules_to_save, self.key("modules_to_save"))
        modules = model.projections()
        chosen = self.choose({n: m for path, m in modules.items() for n in module_names(path, m)})
        for path, linear in modules.items():
            settings = tuple(chosen.get(name) for name in module_names(path, linear))
            if all(setting is None for setting in settings):
                continue
            if self.dropout and (path == ("lm_head",) or linear.is_router):
                name = "lm_head" if path == ("lm_head",) else "a router (mlp.gate)"
                targets = self.key("targets", "target_modules")
                raise JaxtuneError(f"adapter.dropout must be 0 where {targets} has {name}")
            adapter = self.adapter(linear, settings)
            if linear.is_router and adapter.edits_bias(linear):
                raise JaxtuneError(f"{'.'.join(path)} is a router, which has no bias to train")
            if self.trains(".".join((*path, "weight"))):
                raise JaxtuneError(
                    f"{'.'.join(path)} is in {self.key('modules_to_save')}, which trains all of "
                    f"it, and in {self.key('targets', 'target_modules')}"
                )
            layers = declaration_of(linear.weight).layers
            linear.adapter = stack(adapter, *layers) if layers else adapter

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Returns the initial arrays of every adapter; padding is zero."""
        trainable: dict[Path, np.ndarray] = {}
        for path, _, adapter in adapters(definition):
            # The key depends on the module's name, so that adding a target does not change the
            # initial values of the others.
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(".".join(path).encode()))
            for name, declared in _declared(definition, path, adapter).items():
                started = adapter.start(name, declared.stacked_shape, key)
                value = _cut(adapter, name, np.asarray(started, np.float32), declared)
                trainable[(*path, "adapter", name)] = value
        return _trees(definition, trainable)

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns adapter_config.json and the parts of every edited projection, unstacked."""
        del constants
        values, tensors = dict(flatten(trainable)), {}
        settings: dict[str, Setting] = {}
        for path, names, adapter in adapters(definition):
            stacks = {
                part: _flat(np.asarray(values[(*path, "adapter", part)], np.float32), declared)
                for part, declared in _declared(definition, path, adapter).items()
            }
            # i counts layers and experts as in the flattened leading axes. `_slices` cuts the
            # padding off.
            for i, (name, setting) in enumerate(zip(names, adapter.settings, strict=True)):
                if setting is None:
                    continue
                settings[name] = setting
                for attribute, part in adapter.parts(setting).items():
                    value = stacks[attribute][i][_slices(part)]
                    shape = part.file_shape or part.shape
                    tensors[f"{PREFIX}{name}{part.key}"] = owned(value.reshape(shape))
        for path, names, declared in saved_arrays(definition):
            value = np.asarray(values[path], np.float32).reshape(-1, *declared.shape)
            tensors |= {PREFIX + name: owned(value[i]) for i, name in enumerate(names)}
        config = self.peft_config(definition, settings)
        return StoredAdapter(
            config | {"modules_to_save": list(self.modules_to_save) or None}, tensors
        )

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Stacks PEFT's tensors over layers and experts, and those of the saved modules."""
        trainable, constants = self.restore_edits(definition, stored)
        whole = self.whole_weights(definition, stored)
        arrays: dict[Path, jax.Array] = {}
        for path, names, declared in saved_arrays(definition):
            values = np.stack([whole[name].astype(np.float32) for name in names])
            arrays[path] = jnp.asarray(values.reshape(declared.stacked_shape))
        return merge(trainable, unflatten(arrays)), constants

    def restore_edits(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Stacks PEFT's tensors of the edited projections over layers and experts."""
        return pack(definition, stored)

    def whole_weights(
        self, definition: Definition, stored: StoredAdapter
    ) -> Mapping[str, np.ndarray]:
        """Returns the tensors of the saved modules, of any shape, by Hugging Face name."""
        return read_saved(definition, stored, PREFIX)


def pack(definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
    """Stacks the parts of every adapter, found by PEFT's keys, into (trainable, constants)."""
    trainable: dict[Path, np.ndarray] = {}
    for path, names, adapter in adapters(definition):
        declared = _declared(definition, path, adapter)
        packed = {n: np.zeros(d.stacked_shape, np.float32) for n, d in declared.items()}
        for i, (name, setting) in enumerate(zip(names, adapter.settings, strict=True)):
            parts = adapter.parts(setting) if setting is not None else {}
            for attribute, part in parts.items():
                value = _tensor(stored, name, part).reshape(part.shape)
                flat = _flat(packed[attribute], declared[attribute])
                flat[(i, *_slices(part))] = value
        trainable |= {(*path, "adapter", name): value for name, value in packed.items()}
    return _trees(definition, trainable)


def adapters(definition: Definition) -> Iterator[tuple[Path, list[str], SlotAdapter]]:
    """Yields each edited projection's path, its module names and its adapter."""
    for path, linear in definition.projections().items():
        if linear.adapter is not None:
            yield path, module_names(path, linear), linear.adapter


def shared_settings(section: AdapterConfig) -> dict[str, Any]:
    """Returns the arguments of `LinearMethod` from the ``adapter`` section of a config."""
    return {
        "layers": parse_layers(section.layers),
        "modules_to_save": tuple(section.modules_to_save),
    }


def _declared(definition: Definition, path: Path, adapter: SlotAdapter) -> dict[str, Declaration]:
    """Returns the declaration of each trained array of an adapter, by attribute."""
    setting = next(setting for setting in adapter.settings if setting is not None)
    return {
        part: definition.leaves[(*path, "adapter", part)].declaration
        for part in adapter.parts(setting)
    }


def _flat(value: np.ndarray, declaration: Declaration) -> np.ndarray:
    """Returns a view [layers · experts, …] of a stacked array [layers, experts, …]."""
    return value.reshape(math.prod(declaration.stack_shape), *declaration.shape)


def _slices(part: AdapterPart) -> tuple[slice, ...]:
    return tuple(slice(size) for size in part.shape)


def _cut(
    adapter: SlotAdapter, name: str, value: np.ndarray, declaration: Declaration
) -> np.ndarray:
    """Returns a copy of a stacked array whose padding is zero."""
    cut = np.zeros_like(value)
    source, target = _flat(value, declaration), _flat(cut, declaration)
    for i, setting in enumerate(adapter.settings):
        if setting is not None:
            kept = (i, *_slices(adapter.parts(setting)[name]))
            target[kept] = source[kept]
    return cut


def _trees(definition: Definition, trainable: Mapping[Path, np.ndarray]) -> tuple[Tree, Tree]:
    """Builds (trainable, constants); constants that do not follow from settings are zero."""
    constants = {
        path: jnp.zeros(leaf.declaration.stacked_shape, jnp.float32)
        for path, leaf in definition.of_kind("constants").items()
    }
    for path, _, adapter in adapters(definition):
        for name, value in adapter.constants().items():
            shape = constants[(*path, "adapter", name)].shape
            constants[(*path, "adapter", name)] = jnp.asarray(value, jnp.float32).reshape(shape)
    trained = {path: jnp.asarray(value, jnp.float32) for path, value in trainable.items()}
    return unflatten(trained), unflatten(constants)


def _tensor(stored: StoredAdapter, name: str, part: AdapterPart) -> np.ndarray:
    key, shape = f"{PREFIX}{name}{part.key}", part.file_shape or part.shape
    what = f"{name}{part.key.removesuffix('.weight')}"
    if key not in stored.tensors:
        raise JaxtuneError(f'adapter_model.safetensors: lacks "{key}"')
    value = stored.tensors[key]
    if value.shape != shape:
        raise JaxtuneError(
            f"adapter_model.safetensors: {what} has shape {list(value.shape)}, "
            f"the model needs {list(shape)}"
        )
    return value.astype(np.float32)
