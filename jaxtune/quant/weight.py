"""Quantized weights, and the interface of weight formats."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from jaxtune.parallel.rules import constrain
from jaxtune.quant.codes import AnyArray

Parts = dict[str, Any]


class PartSpec(NamedTuple):
    """One array of a quantized weight [out, in].

    Attributes:
      shape: shape without leading axes (layers, experts).
      dtype: dtype of the array.
      axes: dimension of the weight (0: out, 1: in) along which each dimension runs; None for
        neither, which is not sharded.
    """

    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[int | None, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Format(abc.ABC):
    """A weight format with its settings. Subclasses are frozen dataclasses, so that they hash."""

    name: ClassVar[str]

    @abc.abstractmethod
    def parts(self, shape: tuple[int, int]) -> dict[str, PartSpec]:
        """Returns the arrays in which a weight [out, in] is stored, by name."""

    @abc.abstractmethod
    def encode(self, weight: jax.Array) -> Parts:
        """Quantizes rows of a weight, float32 [rows, in]; traceable.

        The number of rows is a multiple of `row_multiple`, except for the last rows. The parts may
        still need `finish`.
        """

    def row_multiple(self, columns: int) -> int:
        """Returns the number of rows of `columns` values that must be encoded together."""
        del columns
        return 1

    def by_rows(self, shape: tuple[int, int]) -> bool:
        """Returns whether rows of a weight [out, in] can be encoded independently."""
        return all(0 in part.axes for part in self.parts(shape).values())

    def finish(self, parts: Parts) -> Parts:
        """Completes the joined results of `encode` for all rows of a weight, in NumPy."""
        return parts

    @abc.abstractmethod
    def decode(self, parts: Mapping[str, AnyArray], shape: tuple[int, int]) -> AnyArray:
        """Returns float32 [out, in]; traceable. NumPy parts give a NumPy array."""

    def numbers(self, key: str, part: np.ndarray) -> np.ndarray:
        """Returns a view of a part, of any shape, in the dtype of the numbers that it stores."""
        del key
        return part

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Returns the size of a weight [out, in] in bytes."""
        return sum(part.nbytes for part in self.parts(shape).values())


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts"],
    meta_fields=["format", "matrix", "axes"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A stack of quantized weights [..., out, in].

    It is a pytree whose leaves, the parts, all have the leading axes, so that `lax.scan`, indexing
    and sharding treat it like a plain array.

    Attributes:
      parts: arrays by name, each with the leading axes (layers, experts) first.
      format: weight format of the parts.
      matrix: (out, in).
      axes: logical axes of out and in.
    """

    parts: Parts
    format: Format
    matrix: tuple[int, int]
    axes: tuple[str | None, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, leading axes included."""
        name, part = next(iter(self.format.parts(self.matrix).items()))
        return (*self.parts[name].shape[: self.parts[name].ndim - len(part.shape)], *self.matrix)

    def dequantize(self, dtype: DTypeLike) -> jax.Array:
        """Returns the weights [..., out, in], computed in float32 and rounded once to `dtype`."""
        lead = len(self.shape) - 2
        parts = self.gathered().parts if lead == 0 else self.parts
        return _decode(self.format, self.matrix, lead, parts).astype(dtype)

    def gathered(self) -> QuantizedWeight:
        """Returns a weight without leading axes, gathered along the hidden axis ("embed").

        Under FSDP each device needs the whole weight. Gathering the codes before they are decoded
        sends a fraction of the bytes of the decoded values.
        """
        axes = tuple(None if axis == "embed" else axis for axis in self.axes)
        specified = self.format.parts(self.matrix)
        parts = {
            name: constrain(value, *_along(specified[name], axes))
            for name, value in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def part_axes(self, name: str) -> tuple[str | None, ...]:
        """Returns the logical axes of a part, without leading axes."""
        return _along(self.format.parts(self.matrix)[name], self.axes)


# jit caches the trace: a step with experts decodes dozens of weights of a few shapes. inline=True
# then inserts the operations instead of a call, because the result of a call is saved for the
# backward pass rather than recomputed from the codes: 9.2 GiB instead of 4.6 for a 7B model.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _decode(format: Format, matrix: tuple[int, int], lead: int, parts: Parts) -> jax.Array:
    decode = functools.partial(format.decode, shape=matrix)
    for _ in range(lead):
        decode = jax.vmap(decode)
    return decode(parts)


def _along(part: PartSpec, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(None if axis is None else axes[axis] for axis in part.axes)
