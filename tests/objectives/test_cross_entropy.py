"""The loss differentiates what is trained of the head, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.layers.head import Head
from jaxtune.layers.linear import Edit, LowRank
from jaxtune.objectives.cross_entropy import cross_entropy

VOCABULARY, HIDDEN, RANK = 50, 16, 4


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=[])
@dataclasses.dataclass
class Int8:
    """A weight that has no gradient: integers, and a scale."""

    codes: jax.Array
    scale: jax.Array

    def dequantize(self, dtype):
        return self.codes.astype(dtype) * self.scale.astype(dtype)


def test_an_edited_head_over_integers_gives_its_edit_the_gradient_of_a_plain_one():
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
