"""Gradients of every weight are those of torch's autograd, whatever is recomputed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import load_torch, make_examples, relative, summed_loss

from jaxtune.adapters.full import Full
from jaxtune.adapters.lora import Lora
from jaxtune.checkpoints.assemble import assemble
from jaxtune.checkpoints.huggingface import checkpoint_tensors, open_source
from jaxtune.data.examples import Examples
from jaxtune.data.loader import eval_batches
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.remat import POLICIES
from jaxtune.layers.tree import flatten
from jaxtune.objectives.sft import sft_loss
from jaxtune.parallel.mesh import single_device_mesh

# Errors of the logits, carried back through every layer and summed over tokens.
GRADIENT = 1e-4
# The same program with other operations fused: a few units in the last place of float32.
RECOMPUTED = 1e-5
LENGTH = 24
ROWS = make_examples(4, longest=LENGTH, seed=3)


def as_batch(rows, length=LENGTH):
    """Makes the rows one unpacked batch, as the loader does."""
    tokens = [np.asarray(row.input_ids, np.int32) for row in rows]
    targets = [np.asarray([*row.labels[1:], -100], np.int32) for row in rows]
    examples = Examples(tokens, targets, [f"rows:{i}" for i in range(len(rows))])
    (batch,) = eval_batches(examples, batch_size=len(rows), length=length, packing=False)
    return {name: jnp.asarray(value) for name, value in batch.items()}


def gradient(parts, policy, key=None, attention="xla"):
    """Returns (loss, gradient of the trainables), both summed over the targets of `ROWS`."""
    options = ForwardOptions(jnp.float32, attention, policy)

    @functools.partial(jax.value_and_grad)
    def loss(trainable):
        model = parts.definition.bind(parts.base, trainable, parts.constants)
        return sft_loss(model, as_batch(ROWS), options, key).loss

    return jax.jit(loss)(parts.trainable)


def load_parts(directory, method):
    return assemble(
        open_source(directory), "float32", single_device_mesh(), method=method, progress=False
    )


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
    ids=["llama-biases", "llama-tied-mqa", "qwen2", "qwen3"],
)
def test_the_gradient_of_every_weight_is_that_of_torch(model_type, changes, tiny):
    directory = tiny(model_type, **changes)
    theirs = load_torch(directory)
    their_loss = summed_loss(theirs, ROWS)
    their_loss.backward()
    parts = load_parts(directory, Full())
    our_loss, trees = gradient(parts, "none")
    assert relative(our_loss, their_loss.item()) <= 1e-5
    ours = dict(checkpoint_tensors(parts.definition, trees, jnp.float32, {}))
    expected = {name: value.grad.numpy() for name, value in theirs.named_parameters()}
    assert set(ours) == set(expected)
    errors = {name: relative(ours[name], expected[name]) for name in expected}
    assert max(errors.values()) <= GRADIENT, errors


@pytest.mark.parametrize("method", [Full(), Lora(4, 8.0, 0.2)], ids=["full", "lora-dropout"])
def test_every_remat_policy_gives_the_same_gradient(method, tiny):
    parts = load_parts(tiny("qwen3"), method)
    key = jax.random.key(1) if method.name == "lora" else None
    loss, expected = gradient(parts, "none", key)
    # The factor A has no gradient while B is zero: this looks at B, where dropout shows.
    kept = [path for path, value in flatten(expected) if np.any(np.asarray(value))]
    assert kept
    for policy in POLICIES:
        again, trees = gradient(parts, policy, key)
        ours, theirs = dict(flatten(trees)), dict(flatten(expected))
        assert relative(again, loss) <= RECOMPUTED
        assert max(relative(ours[path], theirs[path]) for path in kept) <= RECOMPUTED, policy


def test_the_blockwise_backend_gives_the_same_gradient(tiny):
    parts = load_parts(tiny("llama"), Full())
    loss, expected = gradient(parts, "full")
    again, trees = gradient(parts, "full", attention="blockwise")
    assert relative(again, loss) <= RECOMPUTED
    theirs = dict(flatten(expected))
    for path, value in flatten(trees):
        assert relative(value, theirs[path]) <= RECOMPUTED, path
