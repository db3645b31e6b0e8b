"""Codes of quantized weights: packing of 4-bit codes, table look-ups, scales of groups.

4-bit codes of a weight [out, in] are packed as [in / 2, out], in blocks of 64 inputs. For input
j < 32 of a block, byte j holds input j in its high half and input j + 32 in its low half:

    byte 0:  input 0 | input 32        unpack: high halves, then low halves,
    byte 1:  input 1 | input 33        gives inputs 0 … 63 in order
    …
    byte 31: input 31 | input 63

The lanes of a TPU register then run along `out`: unpacking concatenates whole registers, and one
register of scales serves 64 registers of codes. Pairs of neighbouring inputs, as in most formats on
disk, would have to be interleaved across sublanes instead, and a layout along `in` would need a
transposed copy of the codes of all layers.

Decoding functions accept JAX or NumPy arrays, so that a weight read from a file has the same values
as one in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK = 64
_HALF = BLOCK // 2

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)
"""Arrays of JAX, traced or not, or of NumPy; the result is of the same kind as the argument."""


def array_namespace(array: Any) -> Any:
    """Returns the module, `numpy` or `jax.numpy`, that computes with an array."""
    return np if isinstance(array, np.ndarray) else jnp


def packed_size(columns: int) -> int:
    """Returns the number of bytes of the packed 4-bit codes of a row of `columns` values."""
    return -(-columns // BLOCK) * _HALF


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes uint8 [rows, columns], each below 16, to [packed_size(columns), rows]."""
    rows, columns = codes.shape
    padded = jnp.pad(codes, ((0, 0), (0, -columns % BLOCK))).T.reshape(-1, BLOCK, rows)
    return ((padded[:, :_HALF] << 4) | padded[:, _HALF:]).reshape(-1, rows)


def unpack(packed: AnyArray, columns: int) -> AnyArray:
    """Inverts `pack` without the transposition: returns uint8 [columns, rows]. JAX or NumPy."""
    blocks = packed.reshape(-1, _HALF, packed.shape[-1])
    codes = array_namespace(packed).concatenate([blocks >> 4, blocks & 15], axis=1)
    return codes.reshape(-1, packed.shape[-1])[:columns]


def look_up(table: np.ndarray, codes: AnyArray) -> AnyArray:
    """Returns table[codes], float32, for a constant table whose length is a power of two.

    JAX or NumPy. TPUs and CPUs gather one value per instruction but select over whole registers,
    so for 16 entries a tree of selects is faster. On a GPU a gather fuses with the operations that
    follow. For 256 entries only TPUs use selects.
    """
    if isinstance(codes, np.ndarray):
        return table[codes]
    gather = functools.partial(_gather, tuple(table.tolist()))
    select = functools.partial(_select, tuple(table.tolist()))
    if len(table) > 16:
        return lax.platform_dependent(codes, tpu=select, default=gather)
    return lax.platform_dependent(codes, cuda=gather, rocm=gather, default=select)


def _gather(table: Sequence[float], codes: jax.Array) -> jax.Array:
    return jnp.take(jnp.asarray(table, jnp.float32), codes.astype(jnp.int32), axis=0, mode="clip")


def _select(table: Sequence[float], codes: jax.Array) -> jax.Array:
    """Looks codes up with a binary tree of selects: 15 for a table of 16 entries.

    `values` starts as 16 constant arrays. Bit 0 of the code selects between entries 2 i and
    2 i + 1, which leaves 8 arrays, indexed by the remaining bits; bits 1 to 3 leave 4, 2 and 1.
    """
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


def spread(scales: AnyArray, size: int, length: int) -> AnyArray:
    """Repeats each group's value along the first axis: [groups, rows] → [length, rows].

    JAX or NumPy. The last group may be shorter than `size`.
    """
    groups, rows = scales.shape
    tall = array_namespace(scales).broadcast_to(scales[:, None], (groups, size, rows))
    return tall.reshape(groups * size, rows)[:length]


def in_groups(weight: jax.Array, size: int) -> jax.Array:
    """Splits [rows, columns] into [rows, groups, size], padding the last group with its last value.

    Padding with a value of the group leaves its minimum and maximum, hence its scale, unchanged.
    """
    short = -weight.shape[1] % size
    return jnp.pad(weight, ((0, 0), (0, short)), mode="edge").reshape(weight.shape[0], -1, size)
