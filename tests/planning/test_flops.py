"""Operations counted in the jaxpr of a step against closed formulas."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxtune.config import resolve
from jaxtune.planning.flops import count, step_flops
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
LENGTH = 1024


def model(name):
    return json.loads((CONFIGS / f"{name}.json").read_text())


def flops(config, remat="none", **sections):
    config = (
        resolve(
            {
                "data": {"max_length": LENGTH},
                "training": {"batch_size": 2, "remat": remat},
                **sections,
            }
        ),
        config,
    )
    setup = set_up(*config, choose_method(config[0].adapter)[0], jax.devices("cpu")[:1])
    counted = step_flops(setup)
    assert counted.tokens == 2 * LENGTH
    return setup, counted.model / counted.tokens, counted.hardware / counted.tokens


def matrices(setup, experts=1.0):
    """Returns the weights that a token meets; of routed experts a share."""
    total = 0
    for path, leaf in setup.definition.of_kind("base", "trainable").items():
        declaration = leaf.declaration
        if len(declaration.shape) == 2 and "embed_tokens" not in path and "adapter" not in path:
            share = experts if declaration.experts else 1
            total += math.prod(declaration.stacked_shape) * share
    return total


def causal(layers, heads, width):
    """Attention of a token: six products per pair, width / 2 wide on average, half of the pairs."""
    return 6 * LENGTH / 2 * layers * heads * width


# A count and a formula differ by the low-rank factors, the router and the sums over experts.
TOLERANCE = 0.01


@pytest.mark.parametrize("method, each", [("lora", 4), ("full", 6)])
def test_operations_of_a_dense_model_per_weight(method, each):
    setup, asked, done = flops(model("deepseek-llm-7b"), adapter={"method": method, "rank": 1})
    expected = each * matrices(setup) + causal(30, 32, 128 + 128)
    assert abs(asked / expected - 1) < TOLERANCE
    assert done > asked  # the plain attention of a CPU computes what is masked


def test_recomputation_is_one_more_forward_pass():
    setup, asked, done = flops(model("deepseek-llm-7b"), remat="full", adapter={"rank": 1})
    _, same, without = flops(model("deepseek-llm-7b"), adapter={"rank": 1})
    # The head's gradient is taken at once, and a layer's last product is not needed again.
    not_again = 102400 * 4096 + 30 * 11008 * 4096
    attention = causal(30, 32, 256) * 2 / 3
    assert asked == same
    assert abs((done - without) / (2 * (matrices(setup) - not_again) + attention) - 1) < TOLERANCE


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-moe-16b"])
def test_operations_of_experts_follow_the_routing(name):
    config = model(name)
    setup, asked, _ = flops(config, adapter={"rank": 1, "targets": "o_proj"})
    met = matrices(setup, config["num_experts_per_tok"] / config["n_routed_experts"])
    heads = config["num_attention_heads"]
    latent = config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0)
    width = latent + config["v_head_dim"] if latent else 2 * config["hidden_size"] // heads
    expected = 4 * met + causal(config["num_hidden_layers"], heads, width)
    assert abs(asked / expected - 1) < 0.02


def test_micro_batches_change_nothing():
    config = model("deepseek-llm-7b") | {"num_hidden_layers": 2}
    _, *whole = flops(config)
    two = {"batch_size": 2, "accumulation": 2, "remat": "none"}
    _, *split = flops(config, training=two)
    assert [round(n) for n in split] == [round(n) for n in whole]


def test_control_flow_is_counted_by_its_trips():
    x = jnp.ones((8, 8))

    def scanned(x):
        return lax.scan(lambda c, _: (c @ x, None), x, length=5)[0]

    def looped(x):
        return lax.fori_loop(0, 7, lambda i, c: c @ x, x)

    def dynamic(x, n):
        return lax.fori_loop(0, n, lambda i, c: c @ x, x)

    def branched(x, n):
        return lax.cond(n > 0, lambda: x @ x @ x, lambda: x @ x)

    one = 2 * 8**3
    assert count(jax.make_jaxpr(scanned)(x)).plain == 5 * one
    assert count(jax.make_jaxpr(looped)(x)).plain == 7 * one
    assert count(jax.make_jaxpr(dynamic)(x, 3), trips=11).plain == 11 * one
    assert count(jax.make_jaxpr(branched)(x, 3)).plain == 2 * one
    assert count(jax.make_jaxpr(jax.checkpoint(jax.jit(scanned)))(x)).plain == 5 * one
    batched = count(jax.make_jaxpr(jax.vmap(jnp.matmul))(jnp.ones((3, 8, 8)), jnp.ones((3, 8, 8))))
    assert (batched.plain, batched.batched) == (0, 3 * one)


def test_kernels_are_counted_as_they_estimate_themselves():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = x[...]

    def call(x):
        cost = pl.CostEstimate(flops=123, bytes_accessed=0, transcendentals=0)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(kernel, out_shape=like, cost_estimate=cost, interpret=True)(x)

    assert count(jax.make_jaxpr(call)(jnp.ones((8, 128)))).plain == 123


def test_products_are_added_and_scaled():
    from jaxtune.planning.flops import Products

    both = Products(1, 2, 3, 4) + Products(1, 1, 1, 1) * 2
    assert dataclasses.astuple(both) == (3, 4, 5, 6)
