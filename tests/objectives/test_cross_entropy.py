"""The loss differentiates only the trained parts of the head."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune.layers.head import Head
from jaxtune.layers.linear import Edit, LowRank
from jaxtune.objectives.cross_entropy import IGNORE, LossTerms, cross_entropy

VOCABULARY, HIDDEN, RANK = 50, 16, 4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclasses.dataclass
class Int8:
    """A weight that has no gradient: integers, and a scale."""

    codes: jax.Array
    scale: jax.Array

    def dequantize(self, dtype):
        return self.codes.astype(dtype) * self.scale.astype(dtype)


def test_an_edit_of_a_quantized_head_has_the_gradient_over_a_plain_head():
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (2, 24, HIDDEN))
    targets = jax.random.randint(keys[1], (2, 24), 0, VOCABULARY)
    codes = jax.random.randint(keys[2], (VOCABULARY, HIDDEN), -127, 128).astype(jnp.int8)
    quantized = Int8(codes, jnp.float32(1 / 64))
    factors = (
        jax.random.normal(keys[3], (RANK, HIDDEN)),
        jax.random.normal(keys[4], (VOCABULARY, RANK)),
    )

    def loss(factors, hidden, weight):
        head = Head(weight, Edit(LowRank(*factors, jnp.float32(2))))
        return cross_entropy(hidden, head, targets, 16).loss

    differentiate = jax.jit(jax.value_and_grad(loss, (0, 1)))
    ours = differentiate(factors, hidden, quantized)
    plain = differentiate(factors, hidden, quantized.dequantize(jnp.float32))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert all(np.any(np.asarray(gradient)) for gradient in jax.tree.leaves(ours[1]))


@pytest.mark.parametrize(
    "terms",
    [LossTerms(), LossTerms(0.1), LossTerms(0.0, 1e-2), LossTerms(0.3, 1e-2)],
    ids=["plain", "smoothing", "z-loss", "both"],
)
def test_smoothing_and_z_loss_are_those_of_torch_with_their_gradients(terms):
    random = np.random.default_rng(1)
    hidden = random.standard_normal((2, 21, HIDDEN)).astype(np.float32)
    weight = random.standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)
    targets = random.integers(0, VOCABULARY, (2, 21))
    targets[:, ::4] = IGNORE

    def loss(hidden, weight):
        sums = cross_entropy(hidden, Head(weight), jnp.asarray(targets), 16, terms)
        return sums.loss / sums.weight, sums

    (ours, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, weight)
    theirs = [torch.tensor(value, requires_grad=True) for value in (hidden, weight)]
    logits = (theirs[0] @ theirs[1].T).flatten(0, 1)
    labels = torch.tensor(targets).flatten()
    counted = labels != IGNORE
    squares = torch.logsumexp(logits, -1)[counted].square()
    expected = torch.nn.functional.cross_entropy(
        logits, labels, ignore_index=IGNORE, label_smoothing=terms.label_smoothing
    )
    expected = expected + terms.z_loss * squares.mean()
    expected.backward()
    # Two float32 programs: rounding.
    np.testing.assert_allclose(ours, expected.item(), rtol=1e-5)
    for gradient, value in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(gradient, value.grad.numpy(), rtol=1e-4, atol=1e-6)
    plain = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE)
    np.testing.assert_allclose(sums.nll / sums.weight, plain.item(), rtol=1e-5)
    np.testing.assert_allclose(sums.squared_norm, squares.sum().item(), rtol=1e-5)
    if terms.label_smoothing:
        uniform = -torch.log_softmax(logits, -1)[counted].mean(-1).sum()
        np.testing.assert_allclose(sums.uniform, uniform.item(), rtol=1e-5)


def test_a_scaled_loss_keeps_gradients_that_float16_would_lose():
    """Confident predictions: gradients below 6e-8 are nothing in float16, but for the scale."""
    weight = jnp.eye(HIDDEN, dtype=jnp.float16)
    targets = jnp.arange(8)[None]
    hidden = 17 * jax.nn.one_hot(targets, HIDDEN, dtype=jnp.float16)

    def gradient(scale):
        def loss(hidden):
            return scale * cross_entropy(hidden, Head(weight), targets, 16, scale=scale).loss

        found = jax.grad(loss)(hidden)
        assert found.dtype == jnp.float16
        return np.asarray(found, np.float32) / float(scale)

    exact = jax.grad(
        lambda hidden: cross_entropy(hidden, Head(weight.astype(jnp.float32)), targets).loss
    )(hidden.astype(jnp.float32))
    assert np.abs(exact).max() > 0
    # Half of float16's last place.
    np.testing.assert_allclose(gradient(jnp.float32(2**16)), exact, rtol=1e-3, atol=1e-12)
    off = np.abs(gradient(jnp.float32(1)) - exact).max() / np.abs(exact).max()
    assert off > 0.01
