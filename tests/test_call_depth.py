"""Depth of the call stack from the command line to the loss and to the product of q_proj."""

import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jaxtune
from jaxtune.adapters.define import define
from jaxtune.adapters.projections.lora import Lora
from jaxtune.cli import main
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.objectives.sft import sft_loss

ROOT = str(Path(jaxtune.__file__).parent) + os.sep
LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 2,
    "v_head_dim": 8,
}
# [out, in] of q_proj, which no other weight of these models has.
Q_PROJ = (40, 48)


def own_frames(frame) -> list[str]:
    """The functions of jaxtune on the stack, the innermost first; lambdas and closures count."""
    names = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(ROOT):
            file = frame.f_code.co_filename.removeprefix(ROOT)
            names.append(f"{file}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return names


def stacks_at_product(function, shape=Q_PROJ) -> list[list[str]]:
    """Calls a function and returns the stacks at each `lax.dot_general` with a weight of a shape.

    A profile function sees the calls as they are: nothing of jaxtune or jax is replaced.
    """
    wanted, found = jax.lax.dot_general.__code__, []

    def look(frame, event, argument):
        if event == "call" and frame.f_code is wanted and frame.f_locals["rhs"].shape == shape:
            found.append(own_frames(frame))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found


def trace_gradient(config, options):
    """Traces the gradient of the loss of a LoRA model, as a training step does."""
    definition = define(config, "bfloat16", Lora(rank=4, alpha=8.0, targets=("q_proj",)))
    batch = {
        name: jax.ShapeDtypeStruct((2, 8), jnp.int32)
        for name in ("tokens", "targets", "segment_ids", "positions")
    }

    def loss(trainable, base, constants, batch):
        model = definition.bind(base, trainable, constants)
        return sft_loss(model, batch, options, None).loss

    trees = [definition.abstract(kind) for kind in ("trainable", "base", "constants")]
    jax.jit(jax.grad(loss)).trace(*trees, batch)


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("config", [LLAMA, DEEPSEEK_V2], ids=lambda config: config["model_type"])
def test_at_most_ten_functions_lead_from_the_loss_to_the_product_of_q_proj(config, remat):
    jax.clear_caches()  # what is traced already is not called again
    options = ForwardOptions(jnp.bfloat16, remat=remat)
    stacks = stacks_at_product(lambda: trace_gradient(config, options))
    loss = "objectives/sft.py:sft_loss"
    below = [stack[: stack.index(loss)] for stack in stacks if loss in stack]
    deepest = max(below, key=len)
    print("\n".join([loss, *reversed(deepest)]))
    assert deepest[0] == "layers/linear.py:product"
    assert any("Linear.__call__" in name for name in deepest)
    assert len(deepest) <= 10


@pytest.mark.parametrize(
    ("model_type", "changes", "q_proj"),
    [
        ("llama", {"head_dim": 8}, (32, 64)),
        (
            "deepseek_v2",
            {
                "num_key_value_heads": 4,
                "moe_intermediate_size": 24,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": None,
                "kv_lora_rank": 28,
                "qk_nope_head_dim": 6,
                "qk_rope_head_dim": 4,
                "v_head_dim": 12,
            },
            (40, 64),
        ),
    ],
    ids=["llama", "deepseek_v2"],
)
def test_the_command_line_reaches_the_loss_in_10_functions_and_the_product_of_q_proj_in_20(
    model_type, changes, q_proj, tiny, tiny_chat, small_config, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny(model_type, vocab_size=258, num_hidden_layers=2, **changes), model)
    for file in tiny_chat.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, model)
    overrides = {
        "model.path": model,
        "adapter.targets": "q_proj",
        "training.steps": 1,
        "training.batch_size": 2,
        "training.accumulation": 2,
        "data.eval": "",
    }
    arguments = ["train", "--config", str(small_config), "--workdir", str(tmp_path / "run")]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    jax.clear_caches()  # what is traced already is not called again
    stacks = stacks_at_product(lambda: main(arguments), q_proj)
    deepest = max(stacks, key=len)
    print("\n".join(reversed(deepest)))
    assert deepest[-1] == "cli.py:main"
    assert deepest[0] == "layers/linear.py:product"
    assert len(deepest) - deepest.index("objectives/sft.py:sft_loss") <= 10
    assert len(deepest) <= 20
