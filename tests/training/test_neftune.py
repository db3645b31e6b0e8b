"""Noise on embeddings: its size, where it is, and that only training has it."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.layers.decoder import _noisy


def test_the_noise_of_an_example_is_bounded_by_its_length_whatever_it_is_packed_with():
    segments = jnp.array([[1] * 30 + [2] * 60 + [0] * 10, [1] * 90 + [0] * 10])
    hidden, alpha = 64, 5.0
    noise = np.asarray(_noisy(jnp.zeros((2, 100, hidden)), segments, alpha, jax.random.key(0)))
    assert not noise[:, 90:].any()
    for row, length in ((noise[0, :30], 30), (noise[0, 30:90], 60), (noise[1, :90], 90)):
        bound = alpha / np.sqrt(length * hidden)
        assert 0.99 * bound < np.abs(row).max() <= bound
        # A uniform distribution: the standard deviation is the bound over √3, to 3 in 100 here.
        assert row.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_it_is_there_in_training_and_absent_in_evaluation(method, tiny, tmp_path):
    random = np.random.default_rng(0)
    rows = tmp_path / "rows.jsonl"
    examples = [random.integers(3, 160, 24).tolist() for _ in range(8)]
    rows.write_text("".join(json.dumps({"input_ids": e, "labels": e}) + "\n" for e in examples))

    def losses(alpha, seed=0):
        config = {
            "model": {"path": str(tiny("llama"))},
            "data": {
                "train": str(rows),
                "eval": str(rows),
                "overlap": "keep",
                "max_length": 32,
                "packing": False,
            },
            "adapter": {"method": method, "virtual_tokens": 4},
            "training": {"steps": 2, "dtype": "float32", "neftune_alpha": alpha, "seed": seed},
            "optimizer": {"learning_rate": 0.0},
            "logging": {"tensorboard": False},
            "evaluation": {"every": 2},
        }
        run = jaxtune.train(config, tmp_path / f"{alpha}-{seed}")
        return [line["loss"] for line in run.metrics()], run.evaluations()[0]["loss"]

    plain, noisy = losses(0.0), losses(20.0)
    # Rows in another order are summed in another order.
    assert plain[0] == pytest.approx([plain[1]] * 2, rel=1e-5)
    assert noisy[1] == plain[1]
    apart = [abs(a - b) for a, b in itertools.combinations([*noisy[0], plain[1]], 2)]
    assert min(apart) > 1e-3  # another draw for every update
