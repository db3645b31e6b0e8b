"""The gradient of every weight equals that of torch's autograd under every remat policy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import LOSS, load_torch, make_examples, relative, summed_loss
from parts import as_batch, load_parts

from jaxtune.adapters.full import Full
from jaxtune.adapters.projections.lora import Lora
from jaxtune.checkpoints.huggingface import checkpoint_tensors
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import flatten
from jaxtune.objectives.sft import sft_loss
from jaxtune.registry import REMAT_POLICIES

# Errors of logits are propagated back through all layers and summed over tokens.
GRADIENT = 1e-4
# The same computation with different fusions: a few units in the last place of float32.
RECOMPUTED = 1e-5
ROWS = make_examples(4, longest=24, seed=3)


def gradient(parts, policy, key=None, attention="xla"):
    """Returns the loss and the gradient of the trainables, summed over the targets of `ROWS`."""
    options = ForwardOptions(jnp.float32, attention, policy)
    batch = jax.tree.map(jnp.asarray, as_batch(ROWS, 4, 24, packing=False))

    def loss(trainable):
        model = parts.definition.bind(parts.base, trainable, parts.constants)
        return sft_loss(model, batch, options, key).loss

    return jax.jit(jax.value_and_grad(loss))(parts.trainable)


@pytest.mark.parametrize(
    ("model_type", "changes", "policy"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}, "none"),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}, "full"),
        ("qwen2", {}, "save_qkv"),
        ("qwen3", {}, "save_mlp"),
    ],
    ids=["llama-biases", "llama-tied-mqa", "qwen2", "qwen3"],
)
def test_the_gradient_of_every_weight_is_that_of_torch(model_type, changes, policy, tiny):
    directory = tiny(model_type, **changes)
    theirs = load_torch(directory)
    their_loss = summed_loss(theirs, ROWS)
    their_loss.backward()
    parts = load_parts(directory, Full())
    our_loss, tree = gradient(parts, policy)
    assert relative(our_loss, their_loss.item()) <= LOSS
    ours = dict(checkpoint_tensors(parts.definition, tree, jnp.float32, {}))
    expected = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    assert set(ours) == set(expected)
    errors = {name: relative(ours[name], expected[name]) for name in expected}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.slow
@pytest.mark.parametrize("method", [Full(), Lora(4, 8.0, 0.2)], ids=["full", "lora-dropout"])
def test_every_remat_policy_gives_the_same_gradient(method, tiny):
    parts = load_parts(tiny("qwen3"), method)
    key = jax.random.key(1) if method.name == "lora" else None
    loss, expected = gradient(parts, "none", key)
    theirs = dict(flatten(expected))
    # While B is zero, the gradient of A is zero; dropout changes that of B.
    kept = [path for path, value in theirs.items() if np.any(np.asarray(value))]
    assert kept
    for policy in REMAT_POLICIES:
        again, tree = gradient(parts, policy, key)
        ours = dict(flatten(tree))
        assert relative(again, loss) <= RECOMPUTED
        assert max(relative(ours[path], theirs[path]) for path in kept) <= RECOMPUTED, policy


def test_the_blockwise_backend_gives_the_same_gradient(tiny):
    parts = load_parts(tiny("llama"), Full())
    loss, expected = gradient(parts, "full")
    again, tree = gradient(parts, "full", attention="blockwise")
    assert relative(again, loss) <= RECOMPUTED
    theirs = dict(flatten(expected))
    for path, value in flatten(tree):
        assert relative(value, theirs[path]) <= RECOMPUTED, path
