"""Every mesh axis with every kind of model and of method: eight devices train as one does.

Run as a program, this file trains some of the cases on the devices that there are.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# What the axis in question gets of eight devices; "data" gets the others.
AXES = {"data": 8, "fsdp": 4, "tensor": 2, "expert": 4, "sequence": 2}
MODELS = ("llama", "deepseek_v2", "deepseek_v3")
METHODS = {
    "full": {"adapter": {"method": "full"}, "optimizer": {"learning_rate": 1e-3}},
    "lora": {"adapter": {"method": "lora", "targets": "all-linear"}},
    "qlora": {
        "adapter": {"method": "lora", "targets": "all-linear"},
        "quantize": {"format": "nf4"},
    },
    "prefix": {"adapter": {"method": "prefix", "virtual_tokens": 4}},
}
# A Latin square: with 20 of axis and method, every axis and every method meets every model.
CASES = [
    (axis, MODELS[(i + j) % 3], method)
    for (i, axis), (j, method) in itertools.product(enumerate(AXES), enumerate(METHODS))
]
# Sums of float32 in another order, through five updates.
SAME = 1e-5


def name_of(case):
    return "-".join(case)


def train_here(directory, settings):
    """Trains runs by name, each to a directory; what is there already stays."""
    import jaxtune

    for name, config in settings.items():
        jaxtune.train(config, Path(directory) / name)


def start(directory, settings, devices):
    """Returns a process that trains on so many devices."""
    path = directory / "settings.json"
    directory.mkdir()
    path.write_text(json.dumps(settings))
    return subprocess.Popen(
        [sys.executable, __file__, str(directory), str(path)],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def losses(tiny, families, tmp_path_factory):
    """The losses of every case, on one device and on eight."""
    directory = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    rows = directory / "rows.jsonl"
    lines = [generator.integers(3, 160, 12).tolist() for _ in range(16)]
    rows.write_text("".join(json.dumps({"input_ids": x, "labels": x}) + "\n" for x in lines))
    models = {"llama": tiny("llama", num_hidden_layers=2, num_key_value_heads=4)}
    models |= {kind: families(kind) for kind in MODELS[1:]}

    def settings(kind, method, mesh):
        config = {
            "model": {"path": str(models[kind])},
            "data": {"train": str(rows), "max_length": 12, "packing": False},
            "training": {"steps": 5, "batch_size": 8, "dtype": "float32"},
            "optimizer": {"learning_rate": 5e-3, "schedule": "constant"},
            "checkpoint": {"every": 0},
            "logging": {"tensorboard": False},
            "mesh": mesh,
        }
        return config | METHODS[method]

    alone = {
        f"{kind}-{method}": settings(kind, method, {}) for kind in MODELS for method in METHODS
    }
    spread = {
        name_of((axis, kind, method)): settings(kind, method, {"data": -1} | {axis: AXES[axis]})
        for axis, kind, method in CASES
    }
    both = {1: start(directory / "1", alone, 1), 8: start(directory / "8", spread, 8)}
    for process in both.values():
        _, error = process.communicate()
        assert process.returncode == 0, error[-4000:]

    def read(devices, name):
        text = (directory / str(devices) / name / "metrics.jsonl").read_text()
        return [json.loads(line)["loss"] for line in text.splitlines()]

    return read


def test_every_pair_is_among_the_cases():
    assert {(a, m) for a, m, _ in CASES} == set(itertools.product(AXES, MODELS))
    assert {(a, m) for a, _, m in CASES} == set(itertools.product(AXES, METHODS))
    assert {(a, m) for _, a, m in CASES} == set(itertools.product(MODELS, METHODS))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_eight_devices_train_as_one(losses, case):
    _, kind, method = case
    one, eight = losses(1, f"{kind}-{method}"), losses(8, name_of(case))
    assert len(one) == 5 and one[-1] != one[0]
    assert eight == pytest.approx(one, rel=SAME)


if __name__ == "__main__":
    train_here(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
