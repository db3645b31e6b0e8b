"""Runs of eight devices are loaded, evaluated and merged on any others, to the same bytes.

Run as a program, this file does so on the devices and in the processes that there are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
TOKENS = np.arange(3, 19).reshape(2, 8)
PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5]]
RUNS = {
    "lora": {
        "adapter": {"method": "lora", "targets": "all-linear", "modules_to_save": "embed_tokens"},
        "mesh": {"fsdp": 2, "expert": 2, "tensor": 2},
    },
    "dora": {
        "adapter": {"method": "dora", "targets": "q_proj,down_proj"},
        "quantize": {"format": "nf4"},
        "mesh": {"fsdp": 8},
    },
    "full": {"adapter": {"method": "full"}, "mesh": {"fsdp": 4, "tensor": 2}},
}
# Sums over devices come in another order.
SAME = 1e-5


def work(settings, results):
    """Trains runs that do not exist, exports them in both ways, and scores them."""
    from jaxtune.parallel import processes

    addresses = processes.find_addresses(None, None, None, os.environ)
    if addresses is not None:
        processes.initialize(addresses)
    import jaxtune
    from jaxtune.api.evaluate_run import evaluate
    from jaxtune.generation.sampling import Sampling

    results, found = Path(results), {}
    for name, (workdir, config) in json.loads(Path(settings).read_text()).items():
        if not (Path(workdir) / "config.json").exists():
            jaxtune.train(config, workdir)
        run = jaxtune.Run(workdir)
        model = run.model("last")
        dtype = run.config.training.dtype
        for quantized in {False, bool(run.config.quantize.format)}:
            kind = f"{name}-{'quantized' if quantized else 'plain'}"
            run.save_merged(results / f"{kind}-merged", "last", quantized=quantized)
            model.save_pretrained(results / f"{kind}-saved", dtype, quantized=quantized)
        found[name] = {
            "loss": evaluate(run.directory, "last")["loss"],
            "logits": np.asarray(model.logits(TOKENS)).tolist(),
            "answers": model.generate_tokens(PROMPTS, 5, Sampling()),
            "mesh": {axis: size for axis, size in model.mesh.shape.items() if size > 1},
        }
    if processes.leads():
        (results / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def outcomes(tiny, families, tmp_path_factory):
    """Directories of results: of eight devices, of two processes of two devices, and of one."""
    place = tmp_path_factory.mktemp("exports")
    generator = np.random.default_rng(0)
    rows = place / "rows.jsonl"
    lines = [generator.integers(3, 160, 12).tolist() for _ in range(8)]
    rows.write_text("".join(json.dumps({"input_ids": x, "labels": x}) + "\n" for x in lines))
    common = {
        "data": {"train": str(rows), "eval": str(rows), "overlap": "keep", "max_length": 16},
        "training": {"steps": 2, "batch_size": 8, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"batch_size": 8},
        "logging": {"tensorboard": False},
    }
    common["data"]["packing"] = False
    settings = place / "settings.json"
    dense = tiny("llama", num_hidden_layers=2)
    models = {"lora": families("deepseek_v3"), "dora": dense, "full": dense}
    runs = {
        name: (str(place / "runs" / name), common | own | {"model": {"path": str(models[name])}})
        for name, own in RUNS.items()
    }
    settings.write_text(json.dumps(runs))
    found = {}
    for name, devices, launcher in (
        ("eight", 8, []),
        ("processes", 2, [str(LOCAL), "--processes", "2", "--", sys.executable]),
        ("one", 1, []),
    ):
        found[name] = place / name
        found[name].mkdir()
        command = [sys.executable, *launcher, __file__, str(settings), str(found[name])]
        done = subprocess.run(
            command,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "PYTHONPATH": str(LOCAL.parents[1]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
    return found


def weights(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["lora-plain", "dora-plain", "dora-quantized", "full-plain"])
def test_the_same_files_are_written_on_any_devices(kind, outcomes):
    expected = weights(outcomes["one"] / f"{kind}-merged")
    assert expected
    for results in outcomes.values():
        for way in ("merged", "saved"):
            assert weights(results / f"{kind}-{way}") == expected, (results.name, way)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_loaded_on_its_mesh_or_one_that_fits(name, outcomes):
    found = {
        place: json.loads((results / "found.json").read_text())[name]
        for place, results in outcomes.items()
    }
    assert found["eight"]["mesh"] == RUNS[name]["mesh"]
    assert np.prod(list(found["processes"]["mesh"].values())) == 4
    assert found["one"]["mesh"] == {}
    expected = np.array(found["one"]["logits"])
    for place in ("eight", "processes"):
        assert found[place]["answers"] == found["one"]["answers"]
        assert found[place]["loss"] == pytest.approx(found["one"]["loss"], rel=SAME)
        error = np.abs(np.array(found[place]["logits"]) - expected).max()
        assert error <= SAME * np.abs(expected).max(), place


if __name__ == "__main__":
    work(*sys.argv[1:])
