"""A mixture equals a loop over its experts, and its router computes in float32."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.layers.context import Context
from jaxtune.layers.experts.moe import MoE, Router, Routing
from jaxtune.layers.tree import bind, unflatten, variables

HIDDEN, WIDTH, TOKENS = 24, 10, 33
# Sums of some tens of float32 products in another order.
FLOAT32 = 5e-6
PLACE = jnp.zeros((1, TOKENS), jnp.int32)
CONTEXT = Context(PLACE, PLACE, PLACE, PLACE, 0, None, "xla", jnp.float32)
GROUPED = Routing(
    8, 2, "sigmoid", groups=4, top_groups=2, group_top=2, masked=-np.inf, normalize=True, scale=2.5
)


def filled(module, seed=0):
    """Returns (module with random weights, its tree)."""
    found = dict(variables(module))
    keys = jax.random.split(jax.random.key(seed), len(found))
    tree = unflatten(
        {
            path: jax.random.normal(key, variable.get_value().shape)
            for key, (path, variable) in zip(keys, found.items(), strict=True)
        }
    )
    return bind(nnx.graphdef(module), tree), tree


def inputs(seed=1):
    return jax.random.normal(jax.random.key(seed), (1, TOKENS, HIDDEN))


def by_loop(tree, x, weights, experts):
    """The routed part in float64, token by token."""
    gate, up, down = (
        np.asarray(tree["experts"][name]["weight"], np.float64)
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    out = np.zeros(x.shape)
    for n, row in enumerate(np.asarray(x, np.float64)):
        for weight, e in zip(np.asarray(weights)[n], np.asarray(experts)[n], strict=True):
            a = gate[e] @ row
            out[n] += weight * (down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ row)))
    return out


@pytest.mark.parametrize("routing", [Routing(5, 1), Routing(5, 5), GROUPED])
def test_the_routed_part_is_a_loop_over_tokens(routing):
    moe, tree = filled(MoE(HIDDEN, WIDTH, routing, 0))
    x = inputs()
    weights, experts = moe.gate(x[0])
    expected = by_loop(tree, x[0], weights, experts)
    out = np.asarray(jax.jit(moe)(x, CONTEXT)[0])
    assert np.max(np.abs(out - expected)) <= FLOAT32 * np.max(np.abs(expected))


def test_a_token_far_from_the_others_changes_no_other_token():
    # Nothing is dropped and nothing competes for a place.
    moe, _ = filled(MoE(HIDDEN, WIDTH, GROUPED, 1))
    x = inputs()
    before = np.asarray(moe(x, CONTEXT))
    after = np.asarray(moe(x.at[0, 7].set(100.0), CONTEXT))
    others = np.arange(TOKENS) != 7
    assert np.max(np.abs(after - before)[0, others]) <= FLOAT32 * np.max(np.abs(before))
    assert np.max(np.abs(after - before)[0, 7]) > 1


def test_every_token_to_one_expert():
    routing = Routing(8, 1)
    moe, tree = filled(MoE(HIDDEN, WIDTH, routing, 0))
    same = jnp.broadcast_to(inputs()[:, :1], (1, TOKENS, HIDDEN))
    weights, experts = moe.gate(same[0])
    assert len(set(np.asarray(experts).ravel().tolist())) == 1
    expected = by_loop(tree, same[0], weights, experts)
    out = np.asarray(moe(same, CONTEXT)[0])
    assert np.max(np.abs(out - expected)) <= FLOAT32 * np.max(np.abs(expected))


class TestRouter:
    def test_experts_come_from_the_best_groups_only(self):
        router, _ = filled(Router(HIDDEN, GROUPED))
        _, experts = router(inputs()[0])
        free = dataclasses.replace(GROUPED, groups=1)
        everywhere, _ = filled(Router(HIDDEN, free))
        _, freely = everywhere(inputs()[0])
        assert np.any(np.sort(np.asarray(experts)) != np.sort(np.asarray(freely)))
        limited = dataclasses.replace(GROUPED, top_groups=1)
        one_group, _ = filled(Router(HIDDEN, limited))
        _, within = one_group(inputs()[0])
        assert (np.asarray(within)[:, 0] // 2 == np.asarray(within)[:, 1] // 2).all()

    def test_normalized_weights_sum_to_the_scale(self):
        router, _ = filled(Router(HIDDEN, GROUPED))
        weights, _ = router(inputs()[0])
        np.testing.assert_allclose(np.sum(np.asarray(weights), axis=1), 2.5, rtol=1e-6)

    def test_the_bias_decides_the_choice_and_never_the_weights(self):
        router, tree = filled(Router(HIDDEN, dataclasses.replace(GROUPED, correction_bias=True)))
        chosen = np.array([3, 6])
        tree["e_score_correction_bias"] = jnp.zeros(8).at[chosen].set(50.0)
        biased = bind(nnx.graphdef(router), tree)
        weights, experts = biased(inputs()[0])
        assert (np.sort(np.asarray(experts)) == chosen).all()
        scores = 1 / (1 + np.exp(-np.asarray(inputs()[0] @ tree["weight"].T, np.float64)))
        taken = np.take_along_axis(scores, np.asarray(experts), 1)
        expected = 2.5 * taken / taken.sum(1, keepdims=True)
        np.testing.assert_allclose(np.asarray(weights), expected, rtol=1e-5)

    def test_scores_are_float32_where_the_input_is_not(self):
        router, tree = filled(Router(HIDDEN, Routing(8, 8)))
        x = inputs()[0].astype(jnp.bfloat16)
        weights, experts = router(x)
        logits = np.asarray(x, np.float64) @ np.asarray(tree["weight"], np.float64).T
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(
            np.asarray(weights), np.take_along_axis(scores, np.asarray(experts), 1), rtol=1e-4
        )

    def test_no_gradient_passes_through_the_choice(self):
        routing = dataclasses.replace(GROUPED, correction_bias=True)
        router, tree = filled(Router(HIDDEN, routing))
        graphdef = nnx.graphdef(router)

        def total(tree):
            return jnp.sum(jnp.square(bind(graphdef, tree)(inputs()[0])[0]))

        gradient = jax.grad(total)(tree)
        assert not np.any(gradient["e_score_correction_bias"])
        assert np.any(gradient["weight"])
