"""The choke point: every projection of every model goes through `project`.

A weight may be plain or quantized, frozen or trained, and may carry a method's edit. Products
accumulate in float32 and are rounded once. The only residuals are the input and the weight as it
is stored, so no dequantized copy outlives its use, and a frozen weight costs no gradient.

Every edit is a value of one algebra, W' = out_scale · (W + scale · B A) · in_scale, with perhaps
another bias. What has to know what an edit means reads it from here: `project`, the experts, the
head, and merging.

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
from jaxtune.quant import is_quantized, materialize


class LowRank(NamedTuple):
    """The term scale · B diag(rank_scale) A that is added to a weight [out, in].

    Attributes:
      lora_A: [r, in].
      lora_B: [out, r].
      scale: a scalar, or [out] for a scale of each row.
      rank_scale: [r], or None for ones.
    """

    lora_A: jax.Array
    lora_B: jax.Array
    scale: jax.Array
    rank_scale: jax.Array | None = None


class Edit(NamedTuple):
    """What a method makes of a projection: W' = out_scale · (W + low rank) · in_scale, and a bias.

    A part that is None changes nothing. Parts of routed experts have a leading expert axis, except
    low-rank factors that all experts share.

    Attributes:
      low_rank: added to the weight.
      out_scale: float32 [out], on the rows of the sum.
      in_scale: float32 [in], on its columns.
      bias: [out], in place of the projection's own.
    """

    low_rank: LowRank | None = None
    out_scale: jax.Array | None = None
    in_scale: jax.Array | None = None
    bias: jax.Array | None = None


class LinearAdapter(Protocol):
    """What a fine-tuning method puts into the adapter slot of a projection."""

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Returns the edit of a frozen weight [out, in], plain or quantized, and bias [out].

        `dtype` is that of the computation: products with the weight are of arrays of this dtype.
        """
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
    if is_quantized(weight):
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
    x, xa, weight, (lora_A, lora_B, scale, _) = residuals
    gb = (product(g, lora_B.astype(g.dtype), 0) * scale).astype(g.dtype)
    dx = times_weight(g, weight, 0) + product(gb, lora_A.astype(g.dtype), 0)
    edit = LowRank(
        outer(gb, x).astype(lora_A.dtype),
        (outer(g, xa) * scale).astype(lora_B.dtype),
        jnp.zeros_like(scale),
    )
    return dx.astype(g.dtype), None, edit


_linear_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def rescale(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Multiplies x [..., n] with a float32 scale of its last axis and rounds once to its dtype."""
    return x if scale is None else (x * scale).astype(x.dtype)


def _add_low_rank(x: jax.Array, dropped: jax.Array, weight: Any, term: LowRank) -> jax.Array:
    if dropped is x and term.rank_scale is None and term.scale.ndim == 0:
        return _linear_low_rank(x, weight, term)
    # Here a factor that is not trained costs no gradient.
    xa = rescale(_linear(dropped, term.lora_A), term.rank_scale)
    return _linear(x, weight) + rescale(_linear(xa, term.lora_B), term.scale)


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
        edit = adapter.edit(weight, bias, x.dtype)
        x = rescale(x, edit.in_scale)
        if edit.low_rank is None:
            y = _linear(x, weight)
        else:
            y = _add_low_rank(x, adapter.drop(x, key), weight, edit.low_rank)
        y = rescale(y, edit.out_scale)
        bias = bias if edit.bias is None else edit.bias
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

    @property
    def frozen(self) -> tuple[Any, jax.Array | None]:
        """The weight [out, in] and the bias [out], as an adapter's `edit` takes them."""
        return self.weight.get_value(), None if self.bias is None else self.bias.get_value()


def effective_weight(linear: Linear, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Returns the matrix [out, in] and the bias [out] that a projection with its edit stands for.

    For what has to see the matrix itself; applying it costs less with `project`.
    """
    weight, bias = linear.frozen
    if linear.adapter is None:
        return materialize(weight, dtype), bias
    edit = linear.adapter.edit(weight, bias, dtype)
    return edited_weight(weight, edit, dtype), bias if edit.bias is None else edit.bias


def edited_weight(weight: Any, edit: Edit, dtype: DTypeLike) -> jax.Array:
    """Returns the edited weight [out, in] of a plain or quantized one, rounded once to `dtype`."""
    edited = materialize(weight, jnp.float32)
    if edit.low_rank is not None:
        lora_A, lora_B, scale, rank_scale = edit.low_rank
        if rank_scale is not None:
            lora_A = lora_A * rank_scale[:, None]
        delta = jnp.matmul(lora_B, lora_A, precision=lax.Precision.HIGHEST)
        edited = edited + scale.reshape(-1, 1) * delta
    if edit.out_scale is not None:
        edited = edited * edit.out_scale[:, None]
    if edit.in_scale is not None:
        edited = edited * edit.in_scale
    return edited.astype(dtype)
