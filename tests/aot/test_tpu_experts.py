"""Experts on a mesh of chips, compiled for a TPU: communication and products."""

import jax
import pytest
from test_tpu_moe import MIXTURE, products

from jaxtune.adapters.projections.lora import Lora
from jaxtune.config import resolve
from jaxtune.planning.arguments import step_arguments
from jaxtune.planning.collectives import collectives
from jaxtune.planning.topology import find_topology
from jaxtune.training.setup import set_up

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

EXPERTS, ROWS, LENGTH = 64, 8, 256
MESH = {"data": 1, "fsdp": 2, "expert": 2}


def test_codes_are_sent_and_no_product_covers_all_experts():
    config = resolve(
        {
            "data": {"max_length": LENGTH},
            "training": {"batch_size": ROWS, "remat": "full"},
            "quantize": {"format": "int4"},
            "mesh": MESH,
        }
    )
    model = MIXTURE | {"n_routed_experts": EXPERTS}
    method = Lora(4, 8.0, targets=("o_proj",))
    setup = set_up(config, model, method, find_topology("v5e:2x2").devices)
    with jax.set_mesh(setup.mesh):
        step = setup.train_step().lower(*step_arguments(setup)).compile()
    # A device holds half of the experts; a product that met them all would have such an axis,
    # as only the scores of the router may.
    scores = f"f32[{ROWS // 4},{LENGTH},{EXPERTS}]"
    assert not [line for line in products(step, EXPERTS) if f"= {scores}" not in line]
    assert not products(step, EXPERTS // 2)
    found = collectives(step.as_text(), 4)
    hidden, width = MIXTURE["hidden_size"], MIXTURE["moe_intermediate_size"]
    stack = EXPERTS // 2 * hidden * width  # of a projection, on one device
    # Half a byte for each code; along fsdp each device sends half.
    gathered = [c for c in found if c.kind == "all-gather" and c.dtype in ("u8", "s8")]
    assert any(c.sent >= stack // 4 for c in gathered)
    # Nothing as large as a dequantized share travels: activations and their sums are smaller.
    tokens = ROWS * LENGTH * hidden * 4
    others = [c for c in found if c.dtype not in ("u8", "s8", "u32", "s32")]
    assert tokens < 2 * stack
    assert all(c.sent <= tokens for c in others)
    # The sums of experts are scattered to where the tokens are.
    kinds = {c.kind for c in found}
    assert "reduce-scatter" in kinds or "all-reduce" in kinds
