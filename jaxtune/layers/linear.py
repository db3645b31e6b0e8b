"""Projections: products with weights, plain or quantized, with or without a method's edit.

Products accumulate in float32 and are rounded once. The only residuals are the input and the weight
as it is stored: no dequantized copy is kept for the backward pass, and a frozen weight costs no
gradient.

Every edit is a value of one algebra, W' = out_scale · (W + scale · B A) · in_scale, with an
optional new bias. Everything that depends on the meaning of an edit uses this definition: `Linear`,
the experts, the head, and merging.

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
    """The edit of a projection: W' = out_scale · (W + low rank) · in_scale, and a bias.

    None leaves a part unchanged. For routed experts the parts have a leading expert axis, except
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
    """The module that a fine-tuning method puts into the adapter slot of a projection."""

    def edit(self, weight: Any, bias: jax.Array | None, dtype: DTypeLike) -> Edit:
        """Returns the edit of a frozen weight [out, in], plain or quantized, and bias [out].

        `dtype` is the compute dtype: products with the weight are of arrays of this dtype.
        """
        ...

    def drop(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Returns the input [..., in] of the low-rank term; `x` itself where nothing is dropped."""
        ...


def product(x: jax.Array, weight: Any, w_axis: int) -> jax.Array:
    """Contracts the last axis of x with an axis of a weight; sums in float32.

    Args:
      x: [..., n].
      weight: [out, in], plain or quantized; it is cast to the dtype of x.
      w_axis: contracted axis of the weight: 1 for in, 0 for out.

    Returns:
      float32 [..., m].
    """
    if is_quantized(weight):
        # The barrier makes dequantization wait for x. It depends on no activation, so XLA could
        # otherwise schedule it early and hold several dequantized weights at once.
        x, weight = lax.optimization_barrier((x, weight))
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x.ndim - 1,), (w_axis,)), ((), ()))
    weight = materialize(weight, x.dtype)
    return lax.dot_general(x, weight, dims, precision, preferred_element_type=jnp.float32)


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

    The cotangent is rounded to the dtype of x before it meets the weight, because matrix units
    multiply two bfloat16 arrays at full speed.

    A frozen weight costs no gradient: with symbolic zeros, each argument of the forward rule is a
    pair of its value and `perturbed`, which is true if it is differentiated. x is saved as a
    residual only if the weight is. Without x the backward rule returns None, a zero cotangent, and
    the product for the weight's gradient is never traced.
    """
    return product(x, weight, 1)


def is_trained(tree: Any) -> bool:
    """Returns whether any leaf is differentiated, inside the forward rule of a custom_vjp."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    return any(leaf.perturbed for leaf in leaves)


def plain_values(tree: Any) -> Any:
    """Returns the arrays in the arguments of a custom_vjp's forward rule with symbolic zeros."""
    return jax.tree.map(lambda p: p.value, tree, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))


def _linear_forward(x: Any, weight: Any) -> tuple[jax.Array, Any]:
    trained, x, weight = is_trained(weight), x.value, plain_values(weight)
    like = jnp.zeros((), x.dtype)  # carries the dtype of x
    return linear_float32(x, weight), (x if trained else None, weight, like)


def _linear_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, Any]:
    x, weight, like = residuals
    g = g.astype(like.dtype)
    dx = product(g, weight, 0).astype(g.dtype)
    return dx, None if x is None else outer(g, x).astype(weight.dtype)


linear_float32.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)


@jax.custom_vjp
def _linear_low_rank(x: jax.Array, weight: Any, term: LowRank) -> jax.Array:
    """Multiplies x [..., in] with a frozen weight plus a trained term, in the dtype of x.

    One rule for the whole sum: the only activations among its residuals are x and x Aᵀ, and the two
    products that make up dx are added in float32.

    With y = x Wᵀ + s (x Aᵀ) Bᵀ and g = dL/dy [..., out]: gb = s g B [..., r], dx = g W + gb A,
    dA = gbᵀ x and dB = s gᵀ (x Aᵀ).
    """
    return _low_rank_forward(x, weight, term)[0]


def _low_rank_forward(x: jax.Array, weight: Any, term: LowRank) -> tuple[jax.Array, Any]:
    xa = product(x, term.lora_A, 1).astype(x.dtype)
    delta = product(xa, term.lora_B, 1)
    y = (product(x, weight, 1) + term.scale * delta).astype(x.dtype)
    return y, (x, xa, weight, term)


def _low_rank_backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None, LowRank]:
    x, xa, weight, (lora_A, lora_B, scale, _) = residuals
    gb = (product(g, lora_B, 0) * scale).astype(g.dtype)
    dx = product(g, weight, 0) + product(gb, lora_A, 0)
    term = LowRank(
        outer(gb, x).astype(lora_A.dtype),
        (outer(g, xa) * scale).astype(lora_B.dtype),
        jnp.zeros_like(scale),
    )
    return dx.astype(g.dtype), None, term


_linear_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def rescale(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Multiplies x [..., n] with a float32 scale of its last axis and rounds once to its dtype."""
    return x if scale is None else (x * scale).astype(x.dtype)


class Projection(nnx.Module):
    """The interface of every projection: a weight [out, in] and slots for a fine-tuning method.

    Attributes:
      in_features: length of the input's last axis.
      out_features: length of the output's last axis.
      weight: [out, in], or [experts, out, in]; stacked over layers within a model.
      adapter: the edit of the weight; None for none.
      chosen: slot for whole trained weights of some routed experts; see `ExpertLinear`.
      experts: number of routed experts that the weight is stacked over; None for a single weight.
      is_router: whether the outputs are the logits of a router.
    """

    in_features: int
    out_features: int
    weight: nnx.Variable
    adapter: Any
    chosen: Any = None
    experts: int | None = None
    is_router: bool = False

    @property
    def frozen(self) -> tuple[Any, jax.Array | None]:
        """The weight [out, in] and the bias [out] or None, as an adapter's `edit` takes them."""
        return self.weight.get_value(), None


class Linear(Projection):
    """A projection [..., in] → [..., out] with an optional bias."""

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
        """Applies the weight, its edit and the bias.

        Args:
          x: [..., in] in the compute dtype.
          key: for dropout; None turns it off.

        Returns:
          [..., out] in the dtype of x.
        """
        weight, bias = self.frozen
        edit = Edit() if self.adapter is None else self.adapter.edit(weight, bias, x.dtype)
        x, term = rescale(x, edit.in_scale), edit.low_rank
        dropped = x if term is None or self.adapter is None else self.adapter.drop(x, key)
        if term is None:
            y = linear_float32(x, weight).astype(x.dtype)
        elif dropped is x and term.rank_scale is None and term.scale.ndim == 0:
            y = _linear_low_rank(x, weight, term)
        else:  # separate products, so that a frozen factor (as in VeRA) costs no gradient
            xa = linear_float32(dropped, term.lora_A).astype(x.dtype)
            xa = rescale(xa, term.rank_scale)
            delta = rescale(linear_float32(xa, term.lora_B).astype(x.dtype), term.scale)
            y = linear_float32(x, weight).astype(x.dtype) + delta
        y = rescale(y, edit.out_scale)
        bias = bias if edit.bias is None else edit.bias
        return y if bias is None else y + bias.astype(y.dtype)

    @property
    def frozen(self) -> tuple[Any, jax.Array | None]:
        """The weight [out, in] and the bias [out] or None, as an adapter's `edit` takes them."""
        return self.weight.get_value(), None if self.bias is None else self.bias.get_value()


def effective_weight(linear: Projection, dtype: DTypeLike) -> tuple[jax.Array, jax.Array | None]:
    """Returns the matrix [out, in] and the bias [out] of a projection, its edit included.

    For computations on the matrix itself; to apply a projection, call it, which costs less.
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
