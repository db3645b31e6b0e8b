"""Floating-point operations of a training step, counted in its jaxpr.

A step is traced with portable operations (plain attention, loops over experts) and no mesh: the
count is that of the whole step on any hardware. Attention kernels differ in their products, which
are counted by formulas from the widths of attention.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.extend import core

from jaxtune.planning.arguments import step_arguments
from jaxtune.training.setup import Setup

# Products of attention over a [T, T] square: scores and values forward, four backward.
_FORWARD, _BACKWARD = 2, 4


@dataclasses.dataclass(frozen=True)
class Products:
    """Matrix products of a program.

    Attributes:
      plain: operations of products without batch dimensions: projections, experts, the head.
      batched: operations of products with batch dimensions: attention.
      weight_bytes: bytes of weights that plain products read: two-dimensional operands whose other
        operand has more dimensions, counted at every read.
      other_bytes: all other bytes that plain products read and write.
    """

    plain: float = 0.0
    batched: float = 0.0
    weight_bytes: float = 0.0
    other_bytes: float = 0.0

    def __add__(self, other: Products) -> Products:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Products(*(a + b for a, b in pairs))

    def __mul__(self, times: float) -> Products:
        return Products(*(times * value for value in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one optimizer step, over all devices.

    Attributes:
      tokens: tokens of a batch, padding and virtual tokens included.
      model: operations without recomputation, with causal attention.
      hardware: operations that are executed, recomputation included.
      weight_bytes: bytes of weights that products read, over all micro-batches.
      other_bytes: all other bytes that products read and write.
    """

    tokens: int
    model: float
    hardware: float
    weight_bytes: float
    other_bytes: float


def step_flops(setup: Setup) -> StepFlops:
    """Counts the operations of one step of a run."""
    rows, length = setup.batch_like()["tokens"].shape
    micro = rows // setup.config.training.accumulation
    trips = _tiles(setup, micro * length)
    without_remat = count(_jaxpr(setup, "none"), trips)
    with_remat = count(_jaxpr(setup, setup.options.remat), trips)
    square = sum(_attention_squares(setup)) * rows * length * length
    attention = square / 2 * (_FORWARD + _BACKWARD)
    executed = square * _squares_executed(setup.options.attention, setup.options.remat)
    return StepFlops(
        tokens=rows * length,
        model=without_remat.plain + attention,
        hardware=with_remat.plain + executed,
        weight_bytes=with_remat.weight_bytes,
        other_bytes=with_remat.other_bytes,
    )


def _squares_executed(backend: str, remat: str) -> float:
    """Returns the number of products of a backend's passes over a whole [T, T] square."""
    again = remat != "none"
    if backend == "xla":  # remat recomputes the scores even if it saves the output
        return _FORWARD * (1 + again) + _BACKWARD
    if backend == "blockwise":  # each block is recomputed in the backward pass, by jax.checkpoint
        return _FORWARD * (2 + again) + _BACKWARD
    # Kernels visit half of the square and recompute the scores in the backward pass: splash in each
    # of its two backward kernels, which also share one more product, cuDNN once.
    forward = _FORWARD * (2 if remat == "full" or (again and backend != "splash") else 1)
    return (forward + (7 if backend == "splash" else 5)) / 2


def _attention_squares(setup: Setup) -> Iterator[float]:
    """Yields, for each block, the operations of one attention product per pair of tokens.

    It is the mean of the two kinds of product, over the width of keys and over that of values.
    """
    for blocks in setup.definition.blocks:
        yield blocks.count * blocks.layer.self_attn.flops_per_pair


def _tiles(setup: Setup, tokens: int) -> float:
    """Returns the trips of a mixture's loops over tiles for a micro-batch; see `MoE.loop_trips`."""
    for blocks in setup.definition.blocks:
        if blocks.layer.mixture is not None:
            return blocks.layer.mixture.loop_trips(tokens)
    return 1.0


def _jaxpr(setup: Setup, remat: str) -> core.ClosedJaxpr:
    options = setup.options._replace(remat=remat, attention="xla", platform="cpu")
    portable = dataclasses.replace(setup, options=options)
    return portable.train_step().trace(*step_arguments(portable)).jaxpr


def count(jaxpr: Any, trips: float = 1.0) -> Products:
    """Counts the matrix products of a jaxpr.

    Args:
      jaxpr: a `jax.extend.core.Jaxpr`, closed or not.
      trips: assumed number of trips of loops for which it depends on the data.
    """
    total = Products()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "scan":
            total += count(params["jaxpr"], trips) * params["length"]
        elif name == "while":
            total += count(params["body_jaxpr"], trips) * _known_trips(equation, trips)
        elif name == "cond":
            branches = [count(branch, trips) for branch in params["branches"]]
            total += max(branches, key=lambda branch: branch.plain + branch.batched)
        elif name == "pallas_call":
            estimate = params.get("cost_estimate")
            total += Products(plain=float(estimate.flops if estimate else 0))
        else:
            for inner in _inner(params):
                total += count(inner, trips)
    return total


def _known_trips(equation: Any, trips: float) -> float:
    """Returns the trips of a loop between literal bounds, else `trips`."""
    literals = [np.asarray(v.val) for v in equation.invars if isinstance(v, core.Literal)]
    counts = [int(value) for value in literals if np.issubdtype(value.dtype, np.integer)]
    return float(max(counts)) if len(counts) >= 2 and max(counts) > 0 else trips


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(each, (core.ClosedJaxpr, core.Jaxpr)):
                yield each


def _dot(equation: Any) -> Products:
    left, right = (var.aval for var in equation.invars[:2])
    out = equation.outvars[0].aval
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    flops = 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    if batch:
        return Products(batched=flops)
    left_bytes, right_bytes, out_bytes = (x.size * x.dtype.itemsize for x in (left, right, out))
    is_weight = right.ndim == 2 and left.ndim > 2
    return Products(
        plain=flops,
        weight_bytes=right_bytes if is_weight else 0,
        other_bytes=left_bytes + out_bytes + (0 if is_weight else right_bytes),
    )
