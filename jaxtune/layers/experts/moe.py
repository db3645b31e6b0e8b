"""Mixtures of experts: a router, routed experts in grouped products, shared experts.

B batch, T time, H hidden, E experts, k experts per token.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxtune.layers.context import Context
from jaxtune.layers.experts.expert_parallel import apply_over_mesh, token_spec
from jaxtune.layers.experts.grouped import (
    Groups,
    choose_kernel,
    group,
    grouped_linear,
    tile_size,
)
from jaxtune.layers.experts.routing_stats import Routed, routed
from jaxtune.layers.linear import LowRank, Projection, edited_weight, linear_float32, rescale
from jaxtune.layers.mlp import MLP
from jaxtune.layers.noise import single_key
from jaxtune.layers.tree import Buffer, parameter


@dataclasses.dataclass(frozen=True)
class Routing:
    """The routing of a model family.

    Attributes:
      experts: E.
      top_k: k.
      scores: "softmax" or "sigmoid" of the router's logits.
      groups: number of groups of experts; 1 for none.
      top_groups: number of best groups, whose experts may be chosen.
      group_top: number of best experts whose scores add up to a group's score.
      masked: score of experts outside the best groups.
      normalize: whether the weights of the chosen experts are divided by their sum.
      scale: factor on the weights.
      correction_bias: whether a bias is added to the scores for the choice, but not the weights.
      float32: whether the router computes in float32 instead of the compute dtype.
    """

    experts: int
    top_k: int
    scores: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    group_top: int = 1
    masked: float = 0.0
    normalize: bool = False
    scale: float = 1.0
    correction_bias: bool = False
    float32: bool = True


class Router(Projection):
    """Chooses the experts of each token."""

    is_router = True

    def __init__(self, hidden_size: int, routing: Routing):
        self.routing = routing
        self.in_features, self.out_features = hidden_size, routing.experts
        self.adapter: Any = nnx.data(None)
        self.weight = parameter((routing.experts, hidden_size), (None, "embed"))
        bias = None
        if routing.correction_bias:
            bias = parameter((routing.experts,), (None,), "zeros", kind=Buffer, dtype="float32")
        self.e_score_correction_bias = nnx.data(bias)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Routes x [N, H]; returns (weights float32 [N, k], experts int32 [N, k])."""
        return self.choose(self.scores(x))

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns the score of every expert, float32 [N, E], of x [N, H]."""
        routing, dtype = self.routing, jnp.float32 if self.routing.float32 else x.dtype
        weight = self.weight.get_value()
        if self.adapter is not None:
            edit = self.adapter.edit(weight, None, jnp.float32)
            weight = edited_weight(weight, edit, jnp.float32)
        logits = lax.dot_general(
            x.astype(dtype),
            weight.astype(dtype),
            (((1,), (1,)), ((), ())),
            lax.Precision.HIGHEST,
        ).astype(jnp.float32)
        return jax.nn.softmax(logits) if routing.scores == "softmax" else jax.nn.sigmoid(logits)

    def choose(self, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (weights float32 [N, k], experts int32 [N, k]) by scores [N, E]."""
        routing = self.routing
        # The choice has no gradient; weights are the scores of the chosen experts, which have one,
        # without the correction bias.
        choice = lax.stop_gradient(scores)
        if self.e_score_correction_bias is not None:
            choice = choice + self.e_score_correction_bias.get_value()
        _, experts = lax.top_k(self._within_best_groups(choice), routing.top_k)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if routing.normalize:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return weights * routing.scale, experts.astype(jnp.int32)

    def routing_stats(
        self, scores: jax.Array, weights: jax.Array, experts: jax.Array, segment_ids: jax.Array
    ) -> Routed:
        """Returns the statistics of a routing; the sums of weights leave out `Routing.scale`.

        Args:
          scores: float32 [N, E], with N = B · T.
          weights: float32 [N, k].
          experts: int32 [N, k].
          segment_ids: int[B, T]; 0 is padding.
        """
        counted, (batch, length) = experts, segment_ids.shape
        if self.e_score_correction_bias is not None:
            # The balance loss of V3 counts the experts with the highest scores, ignoring the
            # correction bias and groups (equation 18 of the report).
            _, counted = lax.top_k(scores, self.routing.top_k)
        if self.routing.scores == "sigmoid":
            scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
        weights = lax.stop_gradient(weights) / self.routing.scale
        scores, experts, weights, counted = (
            a.reshape(batch, length, -1) for a in (scores, experts, weights, counted)
        )
        return routed(scores, experts, weights, counted, segment_ids)

    def _within_best_groups(self, choice: jax.Array) -> jax.Array:
        routing = self.routing
        if routing.groups == 1:
            return choice
        # [N, groups, E / groups]; a group scores the sum of its best `group_top` experts. Experts
        # outside the best groups get the score `masked`, below or equal to any real one.
        grouped = choice.reshape(choice.shape[0], routing.groups, -1)
        group_scores = jnp.sum(lax.top_k(grouped, routing.group_top)[0], axis=-1)
        _, best = lax.top_k(group_scores, routing.top_groups)
        kept = jnp.any(jnp.arange(routing.groups) == best[..., None], axis=1)
        return jnp.where(kept[..., None], grouped, routing.masked).reshape(choice.shape)


class ExpertLinear(Projection):
    """The projections of all routed experts, [E, out, in].

    Attributes:
      chosen: slot for a module with whole trained weights of some experts. Its `replace` maps the
        frozen stack to a `Replaced`; its `merged` maps it, and the indices of a layer and an
        expert, to the weight of that expert.
    """

    def __init__(self, in_features: int, out_features: int, experts: int, axes: tuple[str, str]):
        self.in_features, self.out_features, self.experts = in_features, out_features, experts
        self.weight = parameter((out_features, in_features), axes, experts=experts)
        self.adapter: Any = nnx.data(None)
        self.chosen: Any = nnx.data(None)

    def __call__(self, x: jax.Array, groups: Groups, key: jax.Array | None) -> jax.Array:
        """Projects padded rows [P, in] to [P, out], each with its expert's weight."""
        weight, bias = self.frozen
        if self.chosen is not None:
            weight = self.chosen.replace(weight)
        if self.adapter is None:
            return grouped_linear(x, weight, groups, self.out_features).astype(x.dtype)
        edit = self.adapter.edit(weight, bias, x.dtype)
        x = rescale(x, _of_rows(edit.in_scale, groups))
        y = grouped_linear(x, weight, groups, self.out_features)
        if edit.low_rank is not None:
            y = y + _low_rank(self.adapter.drop(x, key), edit.low_rank, groups, self.out_features)
        y = rescale(y, _of_rows(edit.out_scale, groups))
        if edit.bias is not None:
            y = y + _of_rows(edit.bias, groups)
        return y.astype(x.dtype)

    @property
    def count(self) -> int:
        """Number of experts whose weights this device holds."""
        return self.weight.get_value().shape[0]


def _of_rows(values: Any, groups: Groups) -> Any:
    """Returns the value of each padded row's expert: [E, …] → [P, …]; None for None."""
    if values is None:
        return None
    return jnp.repeat(values[groups.tile_expert], groups.tile, axis=0)


def _low_rank(x: jax.Array, term: LowRank, groups: Groups, out_features: int) -> jax.Array:
    """Returns the low-rank term of padded rows, float32 [P, out].

    Factors are [E, r, in] and [E, out, r], one pair per expert, or without the axis E if all
    experts share them (VeRA's matrices).
    """

    def multiply(rows: jax.Array, factor: jax.Array, features: int) -> jax.Array:
        if factor.ndim == 2:  # shared by all experts
            return linear_float32(rows, factor)
        return grouped_linear(rows, factor, groups, features)

    xa = multiply(x, term.lora_A, term.lora_A.shape[-2]).astype(x.dtype)
    xa = rescale(xa, _of_rows(term.rank_scale, groups))
    delta = multiply(xa, term.lora_B, out_features)
    scale = _of_rows(term.scale, groups)
    return scale.reshape(len(scale), -1) * delta


class Experts(nnx.Module):
    """The routed experts, each a gated feed-forward block."""

    def __init__(self, hidden_size: int, intermediate_size: int, experts: int):
        up, down = ("mlp", "embed"), ("embed", "mlp")
        self.gate_proj = ExpertLinear(hidden_size, intermediate_size, experts, up)
        self.up_proj = ExpertLinear(hidden_size, intermediate_size, experts, up)
        self.down_proj = ExpertLinear(intermediate_size, hidden_size, experts, down)

    def __call__(self, x: jax.Array, groups: Groups, context: Context) -> jax.Array:
        """Maps padded rows [P, H] to [P, H]."""
        gate = self.gate_proj(x, groups, context.key_for("experts.gate_proj"))
        up = self.up_proj(x, groups, context.key_for("experts.up_proj"))
        key = context.key_for("experts.down_proj")
        return self.down_proj(jax.nn.silu(gate) * up, groups, key)


class MoE(nnx.Module):
    """The weighted sum of routed experts, plus shared experts as one wider block.

    Source: Dai et al., 2024 (DeepSeekMoE); DeepSeek-V2 and V3 reports for the routing.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, routing: Routing, shared_experts: int
    ):
        self.gate = Router(hidden_size, routing)
        self.experts = Experts(hidden_size, intermediate_size, routing.experts)
        shared = MLP(hidden_size, intermediate_size * shared_experts) if shared_experts else None
        self.shared_experts = nnx.data(shared)

    @property
    def activation_width(self) -> int:
        """Values per token within the mixture.

        For each of its k experts: three vectors of the hidden size (one in the compute dtype, one
        in float32, which counts twice) and three of the expert's width.
        """
        one = self.experts.gate_proj
        return self.gate.routing.top_k * (3 * one.in_features + 3 * one.out_features)

    def loop_trips(self, tokens: int) -> float:
        """Returns the trips of one loop of a grouped product: the tiles that `tokens` tokens fill.

        With some experts trained two loops share the tiles; see `grouped`.
        """
        rows = tokens * self.gate.routing.top_k
        loops = 1 if self.experts.gate_proj.chosen is None else 2
        return rows / tile_size(rows, self.gate.routing.experts) / loops

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps x [B, T, H] to [B, T, H]."""
        return self.with_routing(x, context)[0]

    def with_routing(self, x: jax.Array, context: Context) -> tuple[jax.Array, Routed]:
        """Maps x [B, T, H] to [B, T, H]; also returns the routing of its tokens."""
        rows = x.reshape(-1, x.shape[-1])
        scores = self.gate.scores(rows)
        weights, experts = self.gate.choose(scores)
        routing = self.gate.routing_stats(scores, weights, experts, context.segment_ids)
        out = self._routed(x, experts, weights, context)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x, context)
        return out, routing

    def _routed(
        self, x: jax.Array, experts: jax.Array, weights: jax.Array, context: Context
    ) -> jax.Array:
        """Returns [B, T, H]: the outputs of experts [N, k] for x [B, T, H], weighted by [N, k]."""

        def apply(
            rows: jax.Array, chosen: jax.Array, weights: jax.Array, key: Any, experts: Experts
        ) -> jax.Array:
            return _apply(rows, chosen, weights, experts, dataclasses.replace(context, key=key))

        # Experts get the tokens of all rows, so they share a key.
        key = None if context.key is None else single_key(context.key)
        spec = token_spec(x.shape)
        if spec is None:
            rows = x.reshape(-1, x.shape[-1])
            return apply(rows, experts, weights, key, self.experts).reshape(x.shape)
        chosen, weights = (a.reshape(*x.shape[:2], -1) for a in (experts, weights))
        return apply_over_mesh(self.experts, spec, x, chosen, weights, key, apply)


def _apply(
    rows: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts, context: Context
) -> jax.Array:
    """Returns [N, H]: the outputs of experts [N, k] for rows [N, H], weighted by [N, k].

    Indices past the last expert contribute nothing.
    """
    top_k, count = chosen.shape[1], experts.gate_proj.count
    kernel = choose_kernel(context.platform)
    groups = group(chosen.reshape(-1), count, kernel)
    # groups.source numbers the N · k (token, choice) pairs, so // top_k is the token. Padding has
    # the number N · k and reads an additional row of zeros.
    padded = jnp.pad(rows, ((0, 1), (0, 0)))[jnp.minimum(groups.source // top_k, len(rows))]
    y = experts(padded, groups, context)
    returned = y[groups.slot].reshape(*chosen.shape, -1)
    out = jnp.einsum("nkh,nk->nh", returned, weights.astype(returned.dtype))
    return out.astype(rows.dtype)
