"""Codes of quantized weights: packing of 4-bit codes, table look-ups, scales of groups.

4-bit codes of a weight [out, in] are stored as [in, out], two per byte, in blocks of 64 inputs:
byte j of a block holds input j in its high half and input j + 32 in its low half. The lanes of a
TPU register then run along `out`: unpacking concatenates whole registers, and one register of
scales serves 64 registers of codes. A layout along `in` would need a transposed copy of the codes
of all layers.

Functions that decode take JAX or NumPy arrays, so that a weight in a file has the same values as
one in memory.
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
"""Arrays of JAX, traced or not, or of NumPy: what comes out is what goes in."""


def array_namespace(array: Any) -> Any:
    """Returns the module, `numpy` or `jax.numpy`, that computes with an array."""
    return np if isinstance(array, np.ndarray) else jnp


def packed_size(columns: int) -> int:
    """Returns the number of bytes that the 4-bit codes of a row of `columns` values take."""
    return -(-columns // BLOCK) * _HALF


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes uint8 [rows, columns], each under 16, to [packed_size(columns), rows]."""
    rows, columns = codes.shape
    padded = jnp.pad(codes, ((0, 0), (0, -columns % BLOCK))).T.reshape(-1, BLOCK, rows)
    return ((padded[:, :_HALF] << 4) | padded[:, _HALF:]).reshape(-1, rows)


def unpack(packed: AnyArray, columns: int) -> AnyArray:
    """Undoes `pack` up to a transposition: returns uint8 [columns, rows]. JAX or NumPy."""
    blocks = packed.reshape(-1, _HALF, packed.shape[-1])
    codes = array_namespace(packed).concatenate([blocks >> 4, blocks & 15], axis=1)
    return codes.reshape(-1, packed.shape[-1])[:columns]


def look_up(table: np.ndarray, codes: AnyArray) -> AnyArray:
    """Returns table[codes], float32, for a constant table whose length is a power of two.

    JAX or NumPy. A TPU gathers one value per instruction but selects over whole registers. On a GPU
    a gather fuses with the operations that follow, and selects are slower.
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
    """Halves the table with each bit of the code, lowest bit first: 15 selects for 16 entries."""
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

    Padding with a value of the group leaves its extremes, and so its scale, unchanged.
    """
    short = -weight.shape[1] % size
    return jnp.pad(weight, ((0, 0), (0, short)), mode="edge").reshape(weight.shape[0], -1, size)
