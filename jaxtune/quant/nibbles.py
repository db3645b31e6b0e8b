"""Two 4-bit codes per byte, and looking codes up in a table.

Codes of a weight [out, in] are stored as [in, out], in blocks of 64 inputs: byte j of a block holds
input j in its high half and input j + 32 in its low one. A TPU's registers then run along `out`:
unpacking is a concatenation of whole registers, and a scale is one register for 64 others. Along
`in` it would cost a copy of the codes of all layers in another order.
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


def packed_size(columns: int) -> int:
    """Returns how many bytes the codes of a row of so many columns take."""
    return -(-columns // BLOCK) * _HALF


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes uint8 [rows, columns], each under 16, to [packed_size(columns), rows]."""
    rows, columns = codes.shape
    padded = jnp.pad(codes, ((0, 0), (0, -columns % BLOCK))).T.reshape(-1, BLOCK, rows)
    return ((padded[:, :_HALF] << 4) | padded[:, _HALF:]).reshape(-1, rows)


def unpack(packed: jax.Array, columns: int) -> jax.Array:
    """Returns the codes that `pack` was given, transposed: uint8 [columns, rows]."""
    blocks = packed.reshape(-1, _HALF, packed.shape[-1])
    codes = jnp.concatenate([blocks >> 4, blocks & 15], axis=1)
    return codes.reshape(-1, packed.shape[-1])[:columns]


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
    values = [lax.full_like(codes, value, jnp.float32) for value in table]
    bit = 0
    while len(values) > 1:
        is_set = (codes >> bit) & 1 == 1
        values = [
            lax.select(is_set, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
        bit += 1
    return values[0]


def spread(scales: jax.Array, size: int, length: int) -> jax.Array:
    """Repeats each group's value along the first axis: [groups, rows] → [length, rows]."""
    groups, rows = scales.shape
    tall = jnp.broadcast_to(scales[:, None], (groups, size, rows)).reshape(groups * size, rows)
    return tall[:length]


def in_groups(weight: jax.Array, size: int) -> jax.Array:
    """Cuts [rows, columns] into [rows, groups, size], repeating the last value where it is short.

    The repeated value changes neither extremes nor what is rounded.
    """
    short = -weight.shape[1] % size
    return jnp.pad(weight, ((0, 0), (0, short)), mode="edge").reshape(weight.shape[0], -1, size)
