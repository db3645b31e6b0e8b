"""The choke point: every projection of every model goes through `project`.

A weight may be plain or quantized, frozen or trained, and may carry a low-rank edit. Products
accumulate in float32 and are rounded once. The only residuals are the input and the weight as it
is stored, so no dequantized copy outlives its use, and a frozen weight costs no gradient.

Shapes: x [..., in], weight [out, in] (as Hugging Face stores it), lora_A [r, in], lora_B [out, r].
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxtune.layers.tree import parameter
from jaxtune.quant import QuantizedWeight, materialize


class LowRank(NamedTuple):
    """The edit W + scale · B A of a weight [out, in].

    Attributes:
      lora_A: [r, in].
      lora_B: [out, r].
      scale: scalar.
    """

    lora_A: jax.Array
    lora_B: jax.Array
    scale: jax.Array


class LinearAdapter(Protocol):
    """What a fine-tuning method puts into the adapter slot of a `Linear`."""

    def edit(self) -> LowRank:
        """Returns the edit of the weight."""
        ...

    def drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the low-rank branch's input [..., in]; `x` itself where nothing is dropped."""
        ...


def product(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
    """Contracts the last axis of x [..., n] with axis `w_axis` of w [out, in], in float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (w_axis,)), ((), ()))
    return lax.dot_general(x, w, dims, precision, preferred_element_type=jnp.float32)


def times_weight(x: jax.Array, weight: Any, w_axis: int) -> jax.Array:
    """As `product`, with a weight [out, in] that may be quantized."""
    if isinstance(weight, QuantizedWeight):
        # Not before x is there: a compiler that dequantized ahead would hold many weights at once.
        x, weight = lax.optimization_barrier((x, weight))
    return product(x, materialize(weight, x.dtype), w_axis)


def outer(g: jax.Array, x: jax.Array) -> jax.Array:
    """Sums g ⊗ x over all leading axes: [..., out], [..., in] → float32 [out, in]."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    lead = tuple(range(x.ndim - 1))
    return lax.dot_general(
        g, x, ((lead, lead), ((), ())), precision, preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def linear_float32(x: jax.Array, weight: Any) -> jax.Array:
    """Multiplies x [..., in] with a plain or quantized weight [out, in]; the result is float32.

    The cotangent is rounded to the dtype of x before it meets the weight: a product of two
    bfloat16 arrays is what matrix units are made for.
    """
    return times_weight(x, weight, 1)


def _linear(x: jax.Array, weight: Any) -> jax.Array:
    return linear_float32(x, weight).astype(x.dtype)


def is_trained(tree: Any) -> bool:
    """Says whether any leaf is differentiated, inside the forward rule of a custom_vjp."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    return any(leaf.perturbed for leaf in leaves)


def plain_values(tree: Any) -> Any:
    """Returns the arrays that the forward rule of a custom_vjp with symbolic zeros was given."""
    return jax.tree.map(lambda p: p.value, tree, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))


def _linear_forward(x: Any, weight: Any) -> tuple[jax.Array, Any]:
    trained, x, weight = is_trained(weight), x.value, plain_values(weight)
    # x is kept only where the weight is trained: None marks a frozen one.
    like = jnp.zeros((), x.dtype)
    return linear_float32(x, weight), (x if trained else None, weight, like)


def _linear_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, Any]:
    x, weight, like = residuals
    g = g.astype(like.dtype)
    dx = times_weight(g, weight, 0).astype(g.dtype)
    return dx, None if x is None else outer(g, x).astype(weight.dtype)


linear_float32.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


@jax.custom_vjp
def _linear_low_rank(x: jax.Array, weight: Any, edit: LowRank) -> jax.Array:
    return _low_rank_parts(x, weight, edit)[0]


def _low_rank_parts(x: jax.Array, weight: Any, edit: LowRank) -> tuple[jax.Array, jax.Array]:
    xa = product(x, edit.lora_A.astype(x.dtype), 1).astype(x.dtype)
    delta = product(xa, edit.lora_B.astype(x.dtype), 1)
    return (times_weight(x, weight, 1) + edit.scale * delta).astype(x.dtype), xa


def _low_rank_forward(x: jax.Array, weight: Any, edit: LowRank) -> tuple[jax.Array, Any]:
    y, xa = _low_rank_parts(x, weight, edit)
    return y, (x, xa, weight, edit)


def _low_rank_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, LowRank]:
    x, xa, weight, (lora_A, lora_B, scale) = residuals
    gb = (product(g, lora_B.astype(g.dtype), 0) * scale).astype(g.dtype)
    dx = times_weight(g, weight, 0) + product(gb, lora_A.astype(g.dtype), 0)
    edit = LowRank(
        outer(gb, x).astype(lora_A.dtype),
        (outer(g, xa) * scale).astype(lora_B.dtype),
        jnp.zeros_like(scale),
    )
    return dx.astype(g.dtype), None, edit


_linear_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def project(
    x: jax.Array,
    weight: Any,
    bias: jax.Array | None = None,
    adapter: LinearAdapter | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Applies a weight, its adapter and its bias.

    Args:
      x: [..., in] in the compute dtype.
      weight: [out, in], plain or quantized. Under an adapter it is frozen.
      bias: [out] or None.
      adapter: the method's edit of this weight, or None.
      key: for dropout; None turns it off.

    Returns:
      [..., out] in the dtype of x.
    """
    if adapter is None:
        y = _linear(x, weight)
    else:
        edit, dropped = adapter.edit(), adapter.drop(x, key)
        if dropped is x:
            y = _linear_low_rank(x, weight, edit)
        else:
            xa = _linear(dropped, edit.lora_A)
            scale = edit.scale.astype(x.dtype)
            y = _linear(x, weight) + scale * _linear(xa, edit.lora_B)
    return y if bias is None else y + bias.astype(y.dtype)


class Linear(nnx.Module):
    """A projection [..., in] → [..., out] with an optional bias and an adapter slot."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        bias: bool = False,
    ):
        self.in_features, self.out_features = in_features, out_features
        self.weight = parameter((out_features, in_features), axes)
        self.bias = nnx.data(parameter((out_features,), axes[:1], "zeros") if bias else None)
        self.adapter: Any = nnx.data(None)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Projects x [..., in] to [..., out] in the dtype of x."""
        bias = None if self.bias is None else self.bias.get_value()
        return project(x, self.weight.get_value(), bias, self.adapter, key)


def effective_weight(linear: Linear, dtype: DTypeLike) -> jax.Array:
    """Returns the matrix [out, in] that a projection stands for, its adapter's edit included.

    For what has to see the matrix itself; applying it costs less with `project`.
    """
    weight = linear.weight.get_value()
    if linear.adapter is None:
        return materialize(weight, dtype)
    return edited_weight(weight, linear.adapter.edit(), dtype)


def edited_weight(weight: Any, edit: LowRank, dtype: DTypeLike) -> jax.Array:
    """Returns W + scale · B A [out, in] of a plain or quantized weight, rounded once to `dtype`."""
    delta = jnp.matmul(edit.lora_B, edit.lora_A, precision=lax.Precision.HIGHEST)
    return (materialize(weight, jnp.float32) + edit.scale * delta).astype(dtype)
