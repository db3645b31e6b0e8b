"""Arrays and options that all layers of a forward pass share."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.layers.cpu_bfloat16 import decode
from jaxtune.layers.noise import fold_in

Cache = dict[str, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cos", "sin", "segment_ids", "kv_segment_ids", "cache_index", "key", "prefix"],
    meta_fields=["backend", "dtype", "platform"],
)
@dataclasses.dataclass(frozen=True)
class Context:
    """Positions, segments and options of a forward pass.

    Attributes:
      cos: float32 [B, T, rotary dim / 2].
      sin: like `cos`.
      segment_ids: int[B, T]; 0 is padding.
      kv_segment_ids: int[B, S]; equal to `segment_ids` without a cache.
      cache_index: index in the cache of the first token of this pass. A pass of several tokens
        starts at 0; later passes have one token each.
      key: for dropout in the current layer, a scalar or one of each row [B]; None turns it off.
      backend: attention backend.
      dtype: compute dtype.
      platform: platform of the devices: "cpu", "gpu" or "tpu".
      prefix: [n, width], from which all layers project their prefixes; None if each layer has a
        prefix of its own.
    """

    cos: jax.Array
    sin: jax.Array
    segment_ids: jax.Array
    kv_segment_ids: jax.Array
    cache_index: jax.Array | int
    key: jax.Array | None
    backend: str
    dtype: Any
    platform: str = "cpu"
    prefix: jax.Array | None = None

    def key_for(self, name: str) -> jax.Array | None:
        """Returns the key, a scalar or keys [B], of a named module of the current layer."""
        return None if self.key is None else fold_in(self.key, zlib.crc32(name.encode()))

    def in_layer(self, layer: jax.Array) -> Context:
        """Returns the context with the key of one layer, an int scalar."""
        if self.key is None:
            return self
        return dataclasses.replace(self, key=fold_in(self.key, layer))

    def write(self, cache: Cache, values: Cache, layer: jax.Array | int) -> Cache:
        """Writes values [B, T, …] of this pass into one layer of the stacked cache."""

        def update(stacked: jax.Array, value: jax.Array) -> jax.Array:
            start = (layer, 0, self.cache_index) + (0,) * (value.ndim - 2)
            start = tuple(jnp.asarray(i, jnp.int32) for i in start)
            return lax.dynamic_update_slice(stacked, _as_stored(value[None], stacked), start)

        return {name: update(cache[name], values[name]) for name in cache}

    def read(self, cache: Cache, layer: jax.Array | int) -> Cache:
        """Returns the values [B, S, …] of one layer of the stacked cache, in the compute dtype."""
        return {name: decode(cache[name][layer]).astype(self.dtype) for name in cache}


def _as_stored(value: jax.Array, cache: jax.Array) -> jax.Array:
    """Returns a value as a cache stores it; see `jaxtune.layers.cpu_bfloat16.stored_dtype`."""
    if cache.dtype == jnp.uint16:
        return lax.bitcast_convert_type(value.astype(jnp.bfloat16), jnp.uint16)
    return value.astype(cache.dtype)
