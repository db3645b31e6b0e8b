"""A weight that is stored in fewer bits than it computes in, and what a format has to say of it."""

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
      shape: without leading axes.
      dtype: of the array.
      axes: for each dimension, which one of the weight's (0: out, 1: in) it runs along; None for
        neither, and then it is not sharded.
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
        """Returns the arrays that a weight [out, in] is stored in."""

    @abc.abstractmethod
    def encode(self, weight: jax.Array) -> Parts:
        """Quantizes rows of a weight, float32 [rows, in]; traceable.

        The rows are a multiple of `row_multiple`, unless they are the last ones. Values may still
        need `finish`.
        """

    def row_multiple(self, columns: int) -> int:
        """Returns the number of rows of `columns` values that must be encoded together."""
        del columns
        return 1

    def by_rows(self, shape: tuple[int, int]) -> bool:
        """Returns whether rows of a weight [out, in] can be encoded independently."""
        return all(0 in part.axes for part in self.parts(shape).values())

    def finish(self, parts: Parts) -> Parts:
        """Completes what `encode` gave for all rows of a weight, as NumPy arrays."""
        return parts

    @abc.abstractmethod
    def decode(self, parts: Mapping[str, AnyArray], shape: tuple[int, int]) -> AnyArray:
        """Returns float32 [out, in]; traceable, and NumPy in for NumPy out."""

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
    """A stack of quantized weights, [..., out, in]: a pytree whose leaves have the leading axes.

    Attributes:
      parts: arrays by name, each with the leading axes (layers, experts) first.
      format: what the parts mean.
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
        """Returns a weight without leading axes of which each device has all hidden units.

        Where a weight is spread over devices that each need all of it, the codes travel and not
        the wider values.
        """
        axes = tuple(None if axis == "embed" else axis for axis in self.axes)
        specified = self.format.parts(self.matrix)
        parts = {
            name: constrain(value, *_along(specified[name], axes))
            for name, value in self.parts.items()
        }
        return dataclasses.replace(self, parts=parts)

    def part_axes(self, name: str) -> tuple[str | None, ...]:
        """Returns the logical axes of a part, without those of the leading ones."""
        return _along(self.format.parts(self.matrix)[name], self.axes)


# Weights of one shape are traced once; a step with experts has dozens. Inline, for the output of a
# call is kept for the backward pass: 9.2 GiB for a 7B model where 4.6 do.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _decode(format: Format, matrix: tuple[int, int], lead: int, parts: Parts) -> jax.Array:
    decode = functools.partial(format.decode, shape=matrix)
    for _ in range(lead):
        decode = jax.vmap(decode)
    return decode(parts)


def _along(part: PartSpec, axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(None if axis is None else axes[axis] for axis in part.axes)
