"""Quantizes a tensor of a checkpoint while it is read, in chunks of rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoints.finite import check_finite, count_not_finite, not_finite
from jaxtune.checkpoints.source import ALL, TensorSource
from jaxtune.models.definition import as_matrix
from jaxtune.parallel.host import host_device
from jaxtune.quant import Format

# Number of values converted to float32 at a time (2 MiB), unless 128 rows have more.
CHUNK = 2**19
ROWS = 128  # rows of a block of an fp8 checkpoint, which is read in whole blocks


@functools.partial(jax.jit, static_argnames="form")
def _encode(weight: jax.Array, form: Format) -> tuple[dict[str, jax.Array], jax.Array]:
    weight = weight.astype(jnp.float32)
    return form.encode(weight), jnp.isfinite(weight).all()


def read_quantized(
    source: TensorSource, name: str, form: Format, rows: slice = ALL
) -> dict[str, np.ndarray]:
    """Reads a tensor [out, in] as the parts of a format, without a full copy in higher precision.

    A tensor that is stored in this format, with equal settings, is returned bit for bit.

    Args:
      source: source of the tensor.
      name: name of the tensor.
      form: weight format to quantize to.
      rows: rows to read; all of them unless rows can be encoded independently
        (`Format.by_rows`).

    Returns:
      Arrays with the shapes of `Format.parts` for a weight of these rows.

    Raises:
      JaxtuneError: a value is not finite.
    """
    stored = source.read_parts(name, form)
    if stored is None:
        return quantize_rows(source, name, form, rows)
    if rows not in (slice(0, source.shape(name)[0]), ALL):
        specified = form.parts(as_matrix(source.shape(name)))
        stored = {  # views, where the file is mapped
            key: part[(ALL,) * specified[key].axes.index(0) + (rows,)]
            for key, part in stored.items()
        }
    for key, part in stored.items():
        check_finite(form.numbers(key, part), f"{name} ({key})", source.where(name))
    return stored


def quantize_rows(
    source: TensorSource, name: str, form: Format, rows: slice = ALL
) -> dict[str, np.ndarray]:
    """Quantizes a tensor [out, in] in chunks; arguments and result are as for `read_quantized`."""
    read = functools.partial(source.read, name)
    shape = as_matrix(source.shape(name))
    return encode_rows(read, shape, form, name, source.where(name), rows)


def encode_rows(
    read: Callable[[slice], np.ndarray],
    shape: tuple[int, int],
    form: Format,
    name: str,
    where: str,
    rows: slice = ALL,
) -> dict[str, np.ndarray]:
    """Quantizes a weight [out, in] in chunks of rows.

    The number of rows of a chunk is a multiple of what the format encodes together, so that the
    parts of the chunks can be joined along their axis of rows; `Format.finish` then adds parts
    that need the whole weight, such as the scales of double quantization.

    Args:
      read: returns a slice of rows, [rows, in] of any floating dtype.
      shape: (out, in).
      form: weight format to quantize to.
      name: name of the weight, for messages.
      where: file that holds the weight, or another description of its origin.
      rows: rows to quantize; all of them unless rows can be encoded independently
        (`Format.by_rows`).

    Returns:
      Arrays with the shapes of `Format.parts` for a weight of these rows.

    Raises:
      JaxtuneError: a value is not finite.
    """
    (start, end, _), columns = rows.indices(shape[0]), shape[1]
    multiple = math.lcm(ROWS, form.row_multiple(columns))
    step = max(CHUNK // columns // multiple, 1) * multiple
    device, chunks = host_device(), []
    slices = [slice(first, min(first + step, end)) for first in range(start, end, step)]
    for one in slices:
        values = jax.device_put(read(one), device)
        parts, finite = _encode(values, form)
        if not finite:
            count = sum(count_not_finite(read(each)) for each in slices)
            raise not_finite(count, (end - start) * columns, name, where)
        chunks.append({key: np.asarray(part) for key, part in parts.items()})
    specified, whole = form.parts(shape), {}
    for key in chunks[0]:
        axes = specified[key].axes
        along_rows = axes.index(0) if 0 in axes else 0
        whole[key] = np.concatenate([chunk[key] for chunk in chunks], axis=along_rows)
    return form.finish(whole)
