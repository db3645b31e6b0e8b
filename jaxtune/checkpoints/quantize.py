"""Quantizing one tensor of a checkpoint while it is read, some rows at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.checkpoints.source import ALL, TensorSource
from jaxtune.errors import JaxtuneError
from jaxtune.models.definition import as_matrix
from jaxtune.quant import Format

# Values that are in float32 at one time: 2 MiB of them, or 128 rows.
CHUNK = 2**19
ROWS = 128  # of a block of an fp8 checkpoint, which is read by whole blocks


@functools.partial(jax.jit, static_argnames="form")
def _encode(weight: jax.Array, form: Format) -> tuple[dict[str, jax.Array], jax.Array]:
    weight = weight.astype(jnp.float32)
    return form.encode(weight), jnp.isfinite(weight).all()


def host_device() -> Any:
    """Returns the device of the host's own memory; an accelerator where jax was given no other."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def read_quantized(
    source: TensorSource, name: str, form: Format, rows: slice = ALL
) -> dict[str, np.ndarray]:
    """Reads a tensor [out, in] as the parts of a format, without a copy of it in more bits.

    What is stored in this very format is taken as it is, bit for bit.

    Args:
      source: of the tensor.
      name: of the tensor.
      form: to quantize to.
      rows: all of them, unless the format is one `by_rows`.

    Returns:
      Arrays as `Format.parts` describes them for a weight of these rows alone.

    Raises:
      JaxtuneError: a value that is not finite, and so has no code.
    """
    stored = source.read_parts(name, form)
    if stored is None:
        return quantize_rows(source, name, form, rows)
    if rows == slice(0, source.shape(name)[0]) or rows == ALL:
        return stored
    specified = form.parts(as_matrix(source.shape(name)))
    return {  # views, where the file is mapped
        key: part[(ALL,) * specified[key].axes.index(0) + (rows,)] for key, part in stored.items()
    }


def quantize_rows(
    source: TensorSource, name: str, form: Format, rows: slice = ALL
) -> dict[str, np.ndarray]:
    """Quantizes a tensor [out, in] chunk by chunk; arguments and result as of `read_quantized`."""
    read = functools.partial(source.read, name)
    what = f"{source.where(name)}: {name}"
    return encode_rows(read, as_matrix(source.shape(name)), form, what, rows)


def encode_rows(
    read: Callable[[slice], np.ndarray],
    shape: tuple[int, int],
    form: Format,
    what: str,
    rows: slice = ALL,
) -> dict[str, np.ndarray]:
    """Quantizes a weight [out, in] chunk by chunk.

    Args:
      read: returns some rows, [rows, in] of any floating dtype.
      shape: (out, in).
      form: to quantize to.
      what: the weight is, for messages.
      rows: all of them, unless the format is one `by_rows`.

    Returns:
      Arrays as `Format.parts` describes them for a weight of these rows alone.

    Raises:
      JaxtuneError: a value that is not finite, and so has no code.
    """
    (start, end, _), columns = rows.indices(shape[0]), shape[1]
    multiple = math.lcm(ROWS, form.row_multiple(columns))
    step = max(CHUNK // columns // multiple, 1) * multiple
    device, chunks = host_device(), []
    for first in range(start, end, step):
        last = min(first + step, end)
        values = jax.device_put(read(slice(first, last)), device)
        parts, finite = _encode(values, form)
        if not finite:
            raise JaxtuneError(
                f"{what} has values that are not finite, within rows {first} to {last - 1}: "
                "they cannot be quantized"
            )
        chunks.append({key: np.asarray(part) for key, part in parts.items()})
    specified, whole = form.parts(shape), {}
    for key in chunks[0]:
        axes = specified[key].axes
        along_rows = axes.index(0) if 0 in axes else 0
        whole[key] = np.concatenate([chunk[key] for chunk in chunks], axis=along_rows)
    return form.finish(whole)
