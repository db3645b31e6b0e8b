"""Checks that tensors hold neither NaN nor infinity, at little cost while they are read."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxtune.errors import JaxtuneError

_CHUNK = 2**19  # bytes of values checked at a time, which stay in the processor's cache


def check_finite(values: np.ndarray, name: str, where: str, dtype: DTypeLike | None = None) -> None:
    """Checks the values of a tensor, or of a part of it.

    Args:
      values: array of any shape and dtype; integers pass.
      name: name of the tensor.
      where: file that holds it.
      dtype: dtype to which the values will be cast, in which they must be finite too.

    Raises:
      JaxtuneError: values that are NaN or infinite, or that become infinite in `dtype`; the message
        has their number.
    """
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return
    limit = _limit(values.dtype, np.dtype(values.dtype if dtype is None else dtype))
    if any(_reaches(values[rows], limit) for rows in _chunks(values)):
        raise not_finite(count_not_finite(values, dtype), values.size, name, where, dtype)


def copy_finite(
    target: np.ndarray, values: np.ndarray, name: str, where: str, dtype: DTypeLike
) -> None:
    """Copies a tensor of floating-point numbers, or a part of it, and checks each copied chunk.

    This takes a third of the time of a separate check, since a chunk is in the processor's cache.

    Args:
      target: array of the shape of `values`, to copy to.
      values: see `check_finite`; also for the other arguments and the error.
      name: see `check_finite`.
      where: see `check_finite`.
      dtype: see `check_finite`.
    """
    limit = _limit(target.dtype, np.dtype(dtype))
    for rows in _chunks(values):
        np.copyto(target[rows], values[rows])
        if _reaches(target[rows], limit):
            raise not_finite(count_not_finite(values, dtype), values.size, name, where, dtype)


def count_not_finite(values: np.ndarray, dtype: DTypeLike | None = None) -> int:
    """Returns how many values, of any shape, are not finite or would not be in `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        chunks = (values[rows].astype(dtype or values.dtype) for rows in _chunks(values))
        return sum(int((~np.isfinite(chunk.astype(np.float64))).sum()) for chunk in chunks)


def not_finite(
    count: int,
    size: int,
    name: str,
    where: str,
    dtype: DTypeLike | None = None,
) -> JaxtuneError:
    """Returns the error about `count` of `size` values; see `check_finite`."""
    cast = "" if dtype is None else f" in {np.dtype(dtype).name}"
    verb = "is" if count == 1 else "are"
    return JaxtuneError(
        f"{where}: {name}: {count:,} of {size:,} values {verb} NaN or infinite{cast}"
    )


def _chunks(values: np.ndarray) -> Iterator[Any]:
    """Yields indices of parts of an array along its first axis, of few bytes if rows are short."""
    if not values.size:
        return
    if not values.ndim:
        yield ...
        return
    rows = max(_CHUNK // (values.nbytes // len(values)), 1)
    for first in range(0, len(values), rows):
        yield slice(first, first + rows)


def _reaches(values: np.ndarray, limit: int) -> bool:
    """Returns whether any magnitude, as an integer, reaches a limit.

    Read as an integer, the bits of a positive floating-point number grow with it, and are followed
    by those of infinity and NaN; a negative number has the highest bit set as well. So the maximum
    as a signed integer is that of the positive numbers, and as an unsigned one that of the negative
    numbers, if there are any. NumPy has vector instructions for these maxima and not for `isfinite`
    of 16 bits, which is eight times slower.
    """
    size = values.dtype.itemsize
    sign = 1 << (8 * size - 1)
    signed, unsigned = values.view(f"i{size}"), values.view(f"u{size}")
    return bool(signed.max() >= limit or unsigned.max() >= limit + sign)


@functools.cache
def _limit(dtype: np.dtype, target: np.dtype) -> int:
    """Returns the bits of the smallest number in `dtype` that is infinite or NaN in `target`."""
    info, smallest = jnp.finfo(target), np.inf
    if target != dtype:
        # Rounding to the nearest reaches infinity half a step beyond the largest number.
        smallest = float(info.max) + 2.0 ** (info.maxexp - 2 - info.nmant)
    with np.errstate(over="ignore"):
        limit = np.asarray(smallest, np.float64).astype(dtype)  # NaN where there is no infinity
    return int(limit.view(f"u{dtype.itemsize}"))
