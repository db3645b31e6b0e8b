"""PiSSA starts from the best factors of a rank; a resumed run starts from the same base."""

import json
import shutil

import numpy as np
import pytest

import jaxtune
from jaxtune.adapters.projections.lora import Factor
from jaxtune.adapters.projections.pissa import principal_factors
from jaxtune.checkpoints.formats.safetensors import read_all
from jaxtune.errors import JaxtuneError


@pytest.mark.parametrize("shape", [(96, 64), (640, 768)], ids=["whole", "leading-vectors-alone"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaled_product_is_the_best_of_its_rank(shape, rslora):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    factor = Factor(8, 4.0, rslora)
    lora_A, lora_B = principal_factors(weight, factor)
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    best = (left[:, :8] * values[:8]) @ right[:8]
    # Neighbouring singular values of a random matrix are close, which costs their vectors digits.
    np.testing.assert_allclose(factor.scale * lora_B @ lora_A, best, atol=2e-4 * np.abs(best).max())
    # Both factors are of the same size, row for column.
    np.testing.assert_allclose(
        np.linalg.norm(lora_A, axis=1), np.linalg.norm(lora_B, axis=0), rtol=1e-4
    )
    again = principal_factors(weight, factor)
    assert all(np.array_equal(*pair) for pair in zip((lora_A, lora_B), again, strict=True))


def run_config(directory, rows, **adapter):
    return {
        "model": {"path": str(directory)},
        "data": {"train": str(rows), "max_length": 32},
        "adapter": {"method": "pissa", "rank": 4, "alpha": 4.0} | adapter,
        "training": {"steps": 4, "batch_size": 2, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-2},
        "checkpoint": {"every": 2},
        "logging": {"tensorboard": False},
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"input_ids": [*range(3, 20 + i)], "labels": [*range(3, 20 + i)]} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_resumed_run_ends_like_an_uninterrupted_one(tiny, rows, tmp_path):
    run = jaxtune.train(run_config(tiny("llama"), rows), tmp_path / "run")
    saved = run.adapter_directory("last") / "adapter_model.safetensors"
    unbroken = {name: value.copy() for name, value in read_all(saved).items()}
    shutil.rmtree(run.directory.checkpoints / "4")
    saved.unlink()
    jaxtune.train(None, tmp_path / "run")
    resumed = read_all(saved)
    assert unbroken.keys() == resumed.keys()
    assert all(np.array_equal(unbroken[name], resumed[name]) for name in unbroken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "adapter.alpha must not be 0 with adapter.method=pissa"),
        ({"rank": 65}, "adapter.rank=65 exceeds the number of singular values of model.layers.0"),
    ],
)
def test_an_impossible_start_is_rejected(settings, message, tiny, rows, tmp_path):
    config = run_config(tiny("llama"), rows, **({"targets": "q_proj"} | settings))
    with pytest.raises(JaxtuneError, match=message):
        jaxtune.train(config, tmp_path / "run")
