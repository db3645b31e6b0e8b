"""Two 4-bit codes per byte, and looking codes up in a table.

Codes are packed in blocks of 64 columns: byte j of a block holds column j in its high half and
column j + 32 in its low one. Unpacking is then a concatenation of two slices, and not an
interleaving, which on a TPU costs a copy of the weight; and a block can move to another device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 64
_HALF = BLOCK // 2


def packed_columns(columns: int) -> int:
    """Returns how many bytes a row of so many codes takes."""
    return -(-columns // BLOCK) * _HALF


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes uint8 [rows, columns], each under 16, to [rows, packed_columns(columns)]."""
    rows, columns = codes.shape
    padded = jnp.pad(codes, ((0, 0), (0, -columns % BLOCK))).reshape(rows, -1, BLOCK)
    return ((padded[..., :_HALF] << 4) | padded[..., _HALF:]).reshape(rows, -1)


def unpack(packed: jax.Array, columns: int) -> jax.Array:
    """Undoes `pack`: uint8 [rows, columns]."""
    blocks = packed.reshape(packed.shape[0], -1, _HALF)
    codes = jnp.concatenate([blocks >> 4, blocks & 15], axis=-1)
    return codes.reshape(packed.shape[0], -1)[:, :columns]


def look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    """Returns table[codes], float32, for a constant table whose length is a power of two.

    A gather is one instruction per value on a TPU; selects run on whole registers. On a GPU it is
    the other way round: a gather fuses with what follows.
    """
    gather = functools.partial(_gather, tuple(table.tolist()))
    select = functools.partial(_select, tuple(table.tolist()))
    if len(table) > 16:
        return lax.platform_dependent(codes, tpu=select, default=gather)
    return lax.platform_dependent(codes, cuda=gather, rocm=gather, default=select)


def _gather(table: Sequence[float], codes: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table, jnp.float32), codes.astype(jnp.int32), axis=0, mode="clip")


def _select(table: Sequence[float], codes: jax.Array) -> jax.Array:
    """Halves the table by one bit of the code after the other, the lowest first."""
    codes = codes.astype(jnp.int32)
    values = [jnp.float32(value) for value in table]
    bit = 0
    while len(values) > 1:
        is_set = (codes >> bit) & 1 == 1
        values = [
            jnp.where(is_set, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
        bit += 1
    return values[0]


def spread(scales: jax.Array, size: int, columns: int) -> jax.Array:
    """Repeats each group's value over its columns: [rows, groups] → [rows, columns]."""
    rows, groups = scales.shape
    wide = jnp.broadcast_to(scales[:, :, None], (rows, groups, size)).reshape(rows, groups * size)
    return wide[:, :columns]


def in_groups(weight: jax.Array, size: int) -> jax.Array:
    """Cuts [rows, columns] into [rows, groups, size], repeating the last value where it is short.

    The repeated value changes neither extremes nor what is rounded.
    """
    short = -weight.shape[1] % size
    return jnp.pad(weight, ((0, 0), (0, short)), mode="edge").reshape(weight.shape[0], -1, size)
