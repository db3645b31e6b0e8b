"""The noise of a row does not depend on the micro-batch that it is in."""

import jax
import numpy as np
import pytest

from jaxtune.config import resolve
from jaxtune.models.definition import initialize
from jaxtune.training.setup import set_up
from jaxtune.training.step import CompiledStep
from jaxtune.training.train import choose_method

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ROWS, LENGTH = 4, 8


def first_step(accumulation, **changes):
    """Returns loss and gradient norm of a step on the same rows."""
    training = {"batch_size": ROWS, "accumulation": accumulation, "dtype": "float32"}
    config = resolve(
        {
            "data": {"max_length": LENGTH},
            "adapter": {"rank": 4, "dropout": changes.get("dropout", 0.0)},
            "training": training | {"neftune_alpha": changes.get("neftune", 0.0)},
        }
    )
    method, _ = choose_method(config.adapter)
    setup = set_up(config, LLAMA, method, jax.devices()[:1])
    base = setup.definition.split(initialize(setup.definition, jax.random.key(0)))["base"]
    trainable, constants = method.init(setup.definition, seed=0)
    tokens = np.random.default_rng(0).integers(3, 64, (ROWS, LENGTH), dtype=np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
    }
    with jax.set_mesh(setup.mesh):
        step = CompiledStep(setup.train_step(), base, constants, setup.put_batch)
        _, metrics = step(setup.initial_state(trainable), batch)
    return [float(metrics["loss"]), float(metrics["grad_norm"])]


def test_dropout_and_noise_do_not_depend_on_the_micro_batches():
    noisy = {"dropout": 0.3, "neftune": 5.0}
    whole = first_step(1, **noisy)
    assert first_step(2, **noisy) == pytest.approx(whole, rel=1e-5)  # sums in another order
    # Factors that start at zero hide dropout from the loss, but not from the gradient.
    loss, norm = first_step(1, neftune=5.0)
    assert loss == pytest.approx(whole[0], rel=1e-5)
    assert abs(norm - whole[1]) > 1e-3 * norm
