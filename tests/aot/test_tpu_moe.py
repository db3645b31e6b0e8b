"""A mixture of experts compiled for a TPU uses grouped kernels and no product over all experts."""

import re

import jax
import pytest

from jaxtune.adapters.full import Full
from jaxtune.adapters.projections.lora import Lora
from jaxtune.config import resolve
from jaxtune.planning.plan import step_arguments
from jaxtune.planning.topology import find_topology
from jaxtune.training.setup import set_up

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

# V2-Lite's structure at an eighth of its sizes.
MIXTURE = {
    "model_type": "deepseek_v2",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
}
KERNEL = 'custom_call_target="tpu_custom_call"'
LENGTH, ROWS = 256, 2  # no more: the compiler takes longer for larger arrays


def compiled(experts, method):
    """Compiles the training step of a mixture for one v5e chip."""
    config = resolve({"data": {"max_length": LENGTH}, "training": {"batch_size": ROWS}})
    model = MIXTURE | {"n_routed_experts": experts}
    setup = set_up(config, model, method, find_topology("v5e:1x1").devices)
    with jax.set_mesh(setup.mesh):
        step = setup.train_step().lower(*step_arguments(setup)).compile()
    temporaries = step.memory_analysis().temp_size_in_bytes
    print(f"{method.name}, {experts} experts: {temporaries / 2**20:.0f} MiB of temporaries")
    return step


def products(step, experts):
    """Returns the plain products in which an array of three axes or more has one of experts."""
    lines = re.findall(r"^.* (?:dot|convolution)\(.*$", step.as_text(), re.MULTILINE)
    shapes = re.compile(rf"\[(?=(?:\d+,){{2,}}\d+\])(?:\d+,)*{experts}(?:,\d+)*\]")
    return [line for line in lines if shapes.search(line)]


def assert_grouped(step, experts):
    """Finds the kernels in a compiled step, and no product of every expert."""
    text = step.as_text()
    kernels = set(re.findall(r"grouped_(?:multiply|outer_sums)", text))
    assert kernels == {"grouped_multiply", "grouped_outer_sums"}
    # Three projections: forward, and twice in the backward pass; the weights' gradients beside.
    assert text.count(KERNEL) >= 3 * 3 + 3
    assert not products(step, experts)


def test_each_row_of_a_lora_step_is_multiplied_by_one_expert():
    method = Lora(8, 16.0, targets=("all-linear",))
    few, many = compiled(16, method), compiled(61, method)
    assert_grouped(many, 61)
    # Products of every row with every expert would grow fourfold.
    flops = [step.cost_analysis()["flops"] for step in (few, many)]
    assert flops[1] < 1.5 * flops[0]


def test_grouped_kernels_are_used_for_trained_experts_too():
    assert_grouped(compiled(61, Full()), 61)
