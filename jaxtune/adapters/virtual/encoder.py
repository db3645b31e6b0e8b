"""Layers of the small networks that methods add, in float32. n is the number of virtual tokens."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxtune.layers.linear import product
from jaxtune.layers.noise import dropout
from jaxtune.layers.tree import Trainable, parameter


class Dense(nnx.Module):
    """A trained projection with a bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        axes: tuple[str | None, str | None] = (None, None),
    ):
        self.weight = parameter((out_features, in_features), axes, kind=Trainable)
        self.bias = parameter((out_features,), axes[:1], kind=Trainable)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32 [..., in] to [..., out]."""
        return product(x, self.weight.get_value(), 1) + self.bias.get_value()


class LSTM(nnx.Module):
    """A bidirectional LSTM of several layers, with the parameters of ``torch.nn.LSTM``.

    The gates are stacked in the order of torch: input, forget, cell, output (i, f, g, o).

    Source: Hochreiter and Schmidhuber, 1997.
    """

    def __init__(self, in_features: int, hidden_size: int, num_layers: int, dropout: float):
        self.num_layers, self.dropout = num_layers, dropout
        for layer in range(num_layers):
            width = in_features if layer == 0 else 2 * hidden_size
            for suffix in _suffixes(layer):
                shapes = {"weight_ih": (4 * hidden_size, width), "bias_ih": (4 * hidden_size,)}
                shapes |= {"weight_hh": (4 * hidden_size, hidden_size)}
                shapes |= {"bias_hh": (4 * hidden_size,)}
                for name, shape in shapes.items():
                    declared = parameter(shape, (None,) * len(shape), kind=Trainable)
                    setattr(self, f"{name}_{suffix}", declared)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Maps float32 [n, in] to [n, 2 · hidden]; `key` drops outputs between the layers."""
        for layer in range(self.num_layers):
            if layer and key is not None:
                x = dropout(x, self.dropout, jax.random.fold_in(key, layer))
            forward, backward = _suffixes(layer)
            x = jnp.concatenate(
                [self._run(x, forward, False), self._run(x, backward, True)], axis=-1
            )
        return x

    def _run(self, x: jax.Array, suffix: str, reverse: bool) -> jax.Array:
        """Maps float32 [n, in] to [n, hidden] by one direction of one layer."""
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(self, f"{name}_{suffix}").get_value()
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )

        def step(carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
            h, c = carry
            i, f, g, o = jnp.split(inputs + product(h, weight_hh, 1), 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        # The products with the inputs do not depend on the state: one for all n tokens,
        # [n, 4 · hidden].
        zeros = jnp.zeros(weight_hh.shape[1], x.dtype)
        inputs = product(x, weight_ih, 1) + bias_ih + bias_hh
        return lax.scan(step, (zeros, zeros), inputs, reverse=reverse)[1]


def _suffixes(layer: int) -> tuple[str, str]:
    """Returns the suffixes of torch's parameter names for the two directions of a layer."""
    return f"l{layer}", f"l{layer}_reverse"
