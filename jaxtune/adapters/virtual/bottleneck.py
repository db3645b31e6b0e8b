"""Bottleneck adapters: small networks added to the output of attention and feed-forward layers.

They are stored in the format of AdapterHub's package, since PEFT does not have the method.

Source: Houlsby et al., 2019; Pfeiffer et al., 2020; He et al., 2021 (parallel).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.method import Method, StoredAdapter
from jaxtune.adapters.virtual.common import check_match, checked, draw
from jaxtune.adapters.virtual.encoder import Dense
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError, lookup, shown
from jaxtune.layers.context import Context
from jaxtune.layers.decoder import CausalLM
from jaxtune.layers.linear import linear_float32
from jaxtune.layers.noise import dropout
from jaxtune.layers.tree import Path, Tree, flatten, layer_names, stack, unflatten
from jaxtune.models.definition import Definition, Leaf
from jaxtune.registry import PLACEMENTS

WEIGHTS_FILE = "adapter.safetensors"
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "leakyrelu": functools.partial(jax.nn.leaky_relu, negative_slope=0.01),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}
# Input of an adapter, from the output h of the layer it is attached to and the residual stream x
# that the layer read.
INPUTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "block": lambda h, x: h,
    "sum": lambda h, x: h + x,
    "stream": lambda h, x: x,
}


class Bottleneck(nnx.Module):
    """Computes scaling · up(activation(down(…))), which is added to the output of a layer."""

    def __init__(self, hidden_size: int, name: str, settings: Bottlenecks):
        width = max(1, int(hidden_size // settings.reduction_factor))
        self.adapter_down = Dense(hidden_size, width, ("rank", "embed"))
        self.adapter_up = Dense(width, hidden_size, ("embed", "rank"))
        self.name, self.settings = name, settings

    def __call__(self, h: jax.Array, x: jax.Array, context: Context) -> jax.Array:
        """Returns the addition to the output h [B, T, hidden] of a layer with input x, like h."""
        settings = self.settings
        inputs = INPUTS[settings.reads](h, x).astype(context.dtype)
        down = linear_float32(inputs, self.adapter_down.weight.get_value())
        down = ACTIVATIONS[settings.activation](down + self.adapter_down.bias.get_value())
        up = linear_float32(down.astype(context.dtype), self.adapter_up.weight.get_value())
        up = (up + self.adapter_up.bias.get_value()) * settings.scaling
        return dropout(up, settings.dropout, context.key_for(self.name)).astype(h.dtype)


@dataclasses.dataclass(frozen=True)
class Bottlenecks(Method):
    """Bottleneck adapters in every layer, with their settings.

    Attributes:
      attention: whether attention has an adapter.
      feed_forward: whether the feed-forward layer has an adapter.
      reads: input of the adapter, a key of `INPUTS`.
      reduction_factor: hidden size divided by the size of the bottleneck.
      activation: nonlinearity, a key of `ACTIVATIONS`.
      scaling: factor on the adapter's output.
      dropout: dropout rate on the adapter's output.
      label: name of the adapter in AdapterHub's files.
    """

    name: ClassVar[str] = "bottleneck"
    can_merge: ClassVar[bool] = False
    files: ClassVar[str] = "AdapterHub's"

    attention: bool = True
    feed_forward: bool = True
    reads: str = "block"
    reduction_factor: float = 16.0
    activation: str = "relu"
    scaling: float = 1.0
    dropout: float = 0.0
    label: str = "default"

    def attach(self, model: CausalLM) -> None:
        """Fills the adapter slots of every layer.

        Raises:
          JaxtuneError: an unknown activation.
        """
        hidden = model.hidden_size
        lookup(ACTIVATIONS, self.activation, "adapter.activation")
        for layer, *layers in model.decoder.blocks:
            if self.attention:
                name = "attention_adapters"
                layer.attention_adapters = stack(Bottleneck(hidden, name, self), *layers)
            if self.feed_forward:
                name = "output_adapters"
                layer.output_adapters = stack(Bottleneck(hidden, name, self), *layers)

    def init(self, definition: Definition, seed: int) -> tuple[Tree, Tree]:
        """Draws the down-projections; everything else is zero, so the adapter adds nothing."""
        drawn = flatten(draw(definition, seed, 1.0))
        kept = ("adapter_down", "weight")
        return unflatten({p: v if p[-2:] == kept else jnp.zeros_like(v) for p, v in drawn}), {}

    def store(self, definition: Definition, trainable: Tree, constants: Tree) -> StoredAdapter:
        """Returns the config and tensors in AdapterHub's format."""
        del constants
        values = dict(flatten(trainable))
        tensors = {
            key: np.asarray(value, np.float32)
            for path, leaf in definition.of_kind("trainable").items()
            for key, value in zip(self._keys(path, leaf), values[path], strict=True)
        }
        config = definition.config
        return StoredAdapter(
            {
                "config": self._settings(),
                "hidden_size": definition.hidden_size,
                "model_class": (config.get("architectures") or [None])[0],
                "model_name": config.get("_name_or_path"),
                "model_type": config.get("model_type"),
                "name": self.label,
                "version": "adapters.1.3.0",
            },
            tensors,
        )

    def restore(self, definition: Definition, stored: StoredAdapter) -> tuple[Tree, Tree]:
        """Stacks AdapterHub's tensors over the layers.

        Raises:
          JaxtuneError: a tensor is missing, has another shape or has no place in the model.
        """
        check_match(stored, {"hidden_size": definition.hidden_size})
        needed: set[str] = set()
        trainable: dict[Path, jax.Array] = {}
        for path, leaf in definition.of_kind("trainable").items():
            keys, shape = list(self._keys(path, leaf)), leaf.declaration.shape
            values = [checked(stored.tensors, key, shape, WEIGHTS_FILE) for key in keys]
            trainable[path] = jnp.asarray(np.stack(values))
            needed.update(keys)
        for key in stored.tensors:
            if key not in needed:
                raise JaxtuneError(f'{WEIGHTS_FILE}: "{key}" has no place in the model')
        return unflatten(trainable), {}

    def _keys(self, path: Path, leaf: Leaf) -> Iterator[str]:
        """Yields AdapterHub's key of a parameter in each layer of its block."""
        for name in layer_names(path, leaf.declaration):
            module, part, kind = name.rsplit(".", 2)
            part = f"{part}.0" if part == "adapter_down" else part
            yield f"{module}.adapters.{self.label}.{part}.{kind}"

    def _settings(self) -> dict[str, Any]:
        factor = self.reduction_factor
        return (
            UNSUPPORTED
            | {
                "mh_adapter": self.attention,
                "output_adapter": self.feed_forward,
                "original_ln_before": self.reads == "sum",
                "is_parallel": self.reads == "stream",
                "reduction_factor": int(factor) if factor == int(factor) else factor,
                "non_linearity": self.activation,
                "scaling": self.scaling,
                "dropout": self.dropout,
                "init_weights": "mam_adapter",
                "init_weights_seed": None,
            }
            | NEUTRAL
        )


# Settings of AdapterHub that change the computation, with the only supported value.
UNSUPPORTED: dict[str, Any] = {
    "adapter_residual_before_ln": False,
    "cross_adapter": False,
    "inv_adapter": None,
    "leave_out": [],
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "phm_layer": False,
    "residual_before_ln": True,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
# Settings of features that are not in use, at AdapterHub's defaults.
NEUTRAL: dict[str, Any] = {
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "inv_adapter_reduction_factor": None,
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}
READ = (
    "dropout",
    "init_weights",
    "init_weights_seed",
    "is_parallel",
    "mh_adapter",
    "non_linearity",
    "original_ln_before",
    "output_adapter",
    "reduction_factor",
    "scaling",
)


def from_adapterhub(stored: StoredAdapter) -> Bottlenecks:
    """Returns the method and settings of an adapter written by AdapterHub's package.

    Raises:
      JaxtuneError: an unsupported setting.
    """
    config = stored.config.get("config")
    if not isinstance(config, Mapping):
        raise JaxtuneError('adapter_config.json has no "config" of an AdapterHub adapter')
    for key, plain in UNSUPPORTED.items():
        if config.get(key, plain) != plain:
            raise _unsupported(key, config[key])
    for key, value in config.items():  # also of later versions
        if key not in UNSUPPORTED | NEUTRAL and key not in READ and value not in (None, False):
            raise _unsupported(key[:60], value)
    activation = str(config.get("non_linearity"))
    lookup(ACTIVATIONS, activation, 'adapter_config.json: "non_linearity"')
    parallel, before = _flag(config, "is_parallel"), _flag(config, "original_ln_before")
    return Bottlenecks(
        attention=_flag(config, "mh_adapter"),
        feed_forward=_flag(config, "output_adapter"),
        reads="stream" if parallel else "sum" if before else "block",
        reduction_factor=_number(config, "reduction_factor", 1e-3, 1e6),
        activation=activation,
        scaling=_number(config, "scaling", -1e6, 1e6),
        dropout=_number(config, "dropout", 0, 0.999),
        label=str(stored.config.get("name")),
    )


def _number(config: Mapping[str, Any], key: str, least: float, most: float) -> float:
    value = config.get(key, 0.0)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise _unsupported(key, value)
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _unsupported(key, value)
    return bool(value)


def _unsupported(key: str, value: Any) -> JaxtuneError:
    return JaxtuneError(f'adapter_config.json: "{key}"={shown(value)} is not supported')


def from_config(section: AdapterConfig) -> Bottlenecks:
    """Returns the method that the ``adapter`` section of a config describes."""
    attention, feed_forward, reads = PLACEMENTS[section.placement]
    return Bottlenecks(
        attention,
        feed_forward,
        reads,
        section.reduction_factor,
        section.activation,
        section.scaling,
        section.dropout,
    )
