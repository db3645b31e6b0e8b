"""The load of experts as it is reported, and what a run pays that does not ask for balance."""

import jax
import numpy as np
import pytest

from jaxtune.adapters.projections.lora import Lora
from jaxtune.config import resolve
from jaxtune.planning.plan import step_arguments
from jaxtune.training.expert_load import load_summary, load_table
from jaxtune.training.setup import set_up

LENGTH, EXPERTS = 37, 11
MIXTURE = {
    "model_type": "deepseek",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 2,
}


def prepared(**training):
    config = resolve(
        {
            "data": {"max_length": LENGTH},
            "training": {"batch_size": 4, "accumulation": 2} | training,
        }
    )
    return set_up(config, MIXTURE, Lora(2, 4.0, targets=("o_proj",)))


def test_a_summary_is_over_the_even_share_of_each_layer():
    load = np.array([[4.0, 0.0, 8.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    summary = {name: float(value) for name, value in load_summary(load).items()}
    assert summary == {"expert_load_max": 2.0, "expert_load_min": 0.0, "experts_unused": 1.0}
    assert load_table(load, [1, 3]) == {
        "model.layers.1.mlp.experts": [1.0, 0.0, 2.0, 1.0],
        "model.layers.3.mlp.experts": [1.0, 1.0, 1.0, 1.0],
    }


def test_no_token_is_no_load():
    assert float(load_summary(np.zeros((2, 4)))["expert_load_max"]) == 0.0


def test_the_layers_with_experts_are_found():
    assert prepared().definition.mixture_layers == [2, 4]


@pytest.mark.parametrize("factor", [0.0, 0.01])
def test_balance_is_computed_only_where_it_is_trained_on(factor):
    setup = prepared(balance_loss=factor)
    with jax.set_mesh(setup.mesh):
        text = setup.train_step().lower(*step_arguments(setup)).compile().as_text()
    # The tokens of each expert in each segment of a row.
    assert (f"{LENGTH + 1},{EXPERTS}]" in text) == bool(factor)
