"""Gradients of DeepSeek-MoE, V2 and V3 equal those of torch's autograd, also with packing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import YARN, reference
from oracles import LOSS, make_examples, relative, summed_loss
from parts import as_batch, load_parts

from jaxtune.adapters.full import Full
from jaxtune.checkpoints.huggingface import checkpoint_tensors
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import flatten, merge
from jaxtune.objectives.sft import sft_loss

# Errors of logits are propagated back through all layers and summed over tokens.
GRADIENT = 1e-4
BIAS = "e_score_correction_bias"
ROWS = make_examples(4, longest=24, seed=3)


def gradient(parts, batch, policy="none"):
    """Returns the loss and the gradient of the trainables, summed over the targets of a batch."""
    options = ForwardOptions(jnp.float32, "xla", policy)
    batch = jax.tree.map(jnp.asarray, batch)

    def loss(trainable):
        model = parts.definition.bind(parts.base, trainable, parts.constants)
        return sft_loss(model, batch, options, None).loss

    return jax.jit(jax.value_and_grad(loss))(parts.trainable)


def torch_gradients(model):
    """Returns the gradient of every weight by its name in a checkpoint, one for each expert."""
    gradients = {}
    for name, value in model.named_parameters():
        # An expert without tokens has no gradient.
        grad = np.zeros(value.shape) if value.grad is None else value.grad.numpy()
        prefix, _, fused = name.rpartition("experts.")
        if fused == "gate_up_proj":
            for expert, both in enumerate(grad):
                gate, up = np.split(both, 2)
                gradients[f"{prefix}experts.{expert}.gate_proj.weight"] = gate
                gradients[f"{prefix}experts.{expert}.up_proj.weight"] = up
        elif fused == "down_proj":
            for expert, down in enumerate(grad):
                gradients[f"{prefix}experts.{expert}.down_proj.weight"] = down
        else:
            gradients[name] = grad
    return gradients


@pytest.mark.parametrize(
    ("family", "changes", "policy"),
    [
        ("deepseek", {"norm_topk_prob": True}, "none"),
        ("deepseek_v2", {"attention_bias": True}, "full"),
        (
            "deepseek_v2",
            {
                "q_lora_rank": None,
                "topk_method": "greedy",
                "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
            },
            "save_qkv",
        ),
        ("deepseek_v3", {"rope_parameters": YARN | {"mscale_all_dim": 1.0}}, "full"),
        ("deepseek_v3", {"norm_topk_prob": False, "n_shared_experts": 2}, "save_mlp"),
    ],
    ids=["moe", "v2-groups", "v2-greedy", "v3", "v3-not-normalized"],
)
def test_the_gradient_of_every_weight_is_that_of_torch(family, changes, policy, families):
    directory = families(family, **changes)
    theirs = reference(directory)
    their_loss = summed_loss(theirs, ROWS)
    their_loss.backward()
    parts = load_parts(directory, Full())
    batch = as_batch(ROWS, 4, 24, packing=False)
    our_loss, tree = gradient(parts, batch, policy)
    assert relative(our_loss, their_loss.item()) <= LOSS
    # Only the correction bias is frozen.
    frozen = {path[-1] for path, _ in flatten(parts.base)}
    assert frozen == ({BIAS} if family == "deepseek_v3" else set())
    every = checkpoint_tensors(parts.definition, merge(tree, parts.base), jnp.float32, {})
    ours = {name: value for name, value in every if not name.endswith(BIAS)}
    expected = torch_gradients(theirs)
    assert set(ours) == set(expected)
    moved = [name for name, value in expected.items() if np.any(value)]
    assert {name for name in ours if np.any(ours[name])} == set(moved)
    assert sum(".mlp.experts." in name for name in moved) > len(expected) / 3
    assert sum(name.endswith("mlp.gate.weight") for name in moved) == 2
    errors = {name: relative(ours[name], expected[name]) for name in moved}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize(
    "family",
    [
        pytest.param("deepseek", marks=pytest.mark.slow),
        pytest.param("deepseek_v2", marks=pytest.mark.slow),
        "deepseek_v3",
    ],
)
def test_packed_rows_give_the_loss_and_gradient_of_rows_alone(family, families):
    rows = make_examples(8, longest=24, seed=4)
    parts = load_parts(families(family), Full())
    packed = as_batch(rows, 4, 48, packing=True)
    assert packed["segment_ids"].max() > 1
    loss, expected = gradient(parts, as_batch(rows, 8, 24, packing=False))
    packed_loss, tree = gradient(parts, packed)
    assert relative(packed_loss, loss) <= LOSS
    theirs = dict(flatten(expected))
    for path, value in flatten(tree):
        if np.any(np.asarray(theirs[path])):
            assert relative(value, theirs[path]) <= GRADIENT, path
