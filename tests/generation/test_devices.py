"""Generation on meshes of several devices, and in several processes, equals that on one device.

Run as a program, this file generates on the devices that there are: see `answer`.
"""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Devices along mesh axes.
QUICK = {"llama": [{"data": 2, "tensor": 2}]}
EIGHT = {
    "llama": [{"data": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}],
    "deepseek_v3": [{"data": 2, "expert": 2, "tensor": 2}, {"expert": 8}],
}
TWO_PROCESSES = {"deepseek_v3": [{"expert": 2, "tensor": 2}]}
LIMITS = (110, 7, 30)  # the first makes the cache grow
FEW = (20, 7, 12)
# Log-probabilities of float32 logits whose sums are split over devices.
SAME = 2e-4


def answer(directory, sizes, limits=LIMITS):
    """Returns greedy and sampled tokens, log-probabilities and what a second call has compiled.

    Args:
      directory: checkpoint.
      sizes: devices along mesh axes; {} for a single device.
      limits: maximum number of tokens of each row.
    """
    import jax

    import jaxtune
    from jaxtune.parallel.mesh import MESH_AXES, make_mesh

    axes = dict.fromkeys(MESH_AXES, 1) | sizes
    count = int(np.prod(list(axes.values())))
    mesh = make_mesh(axes, jax.devices()[:count])
    model = jaxtune.load(directory, dtype="float32", mesh=mesh, progress=False)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 160, length).tolist() for length in (5, 20, 11)]
    results = []
    for sampling in (jaxtune.Sampling(), jaxtune.Sampling(1.0, 0.95, 3, 100)):
        answers = model.generation(prompts, limits, sampling, stop=()).complete()
        results += [[row.tokens, row.log_probs] for row in answers]
    compiled = []
    handler = logging.Handler()
    handler.emit = lambda record: compiled.append(record.getMessage())
    logging.getLogger("jax").addHandler(handler)
    with jax.log_compiles():
        model.generation(prompts[::-1], limits[0] - 1, jaxtune.Sampling(0.5), stop=(4,)).complete()
    logging.getLogger("jax").removeHandler(handler)
    return {"rows": results, "compiled": [line[:60] for line in compiled if "Compiling" in line]}


def main(cases, target):
    """Writes the results of cases (arguments of `answer`); process 0 of several writes."""
    from jaxtune.parallel import processes

    if "JAXTUNE_PROCESSES" in os.environ:
        processes.initialize(processes.find_addresses(None, None, None, os.environ))
    results = [answer(*case) for case in json.loads(cases)]
    if processes.leads():
        Path(target).write_text(json.dumps(results))


def run(cases, target, devices, processes=1):
    """Returns the results of cases on devices of one process, or of several."""
    command = [sys.executable, __file__, json.dumps(cases), str(target)]
    if processes > 1:
        launcher = [sys.executable, str(ROOT / "launch" / "local.py")]
        command = [*launcher, "--processes", str(processes), "--", *command]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    environment = os.environ | variables | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(target.read_text())


@pytest.fixture(scope="module")
def checkpoint(tiny, families):
    """Makes the checkpoint of a family."""

    def make(kind):
        small = {"num_hidden_layers": 2, "num_key_value_heads": 4}
        return str(tiny(kind, **small) if kind == "llama" else families(kind))

    return make


def compare(results, expected):
    for (tokens, log_probs), (ours, theirs) in zip(results["rows"], expected["rows"], strict=True):
        assert tokens == ours
        np.testing.assert_allclose(log_probs, theirs, atol=SAME)
    assert results["compiled"] == []


def check(meshes, checkpoint, target, devices, processes=1, limits=LIMITS):
    alone = {kind: answer(checkpoint(kind), {}, limits) for kind in meshes}
    cases = [(kind, mesh) for kind, some in meshes.items() for mesh in some]
    arguments = [(checkpoint(kind), mesh, limits) for kind, mesh in cases]
    for (kind, _), result in zip(cases, run(arguments, target, devices, processes), strict=True):
        assert [len(tokens) for tokens, _ in result["rows"]] == [*limits] * 2
        compare(result, alone[kind])


def test_four_devices_generate_as_one(checkpoint, tmp_path):
    check(QUICK, checkpoint, tmp_path / "results.json", devices=4)


@pytest.mark.slow
def test_every_mesh_of_eight_devices_generates_as_one_device(checkpoint, tmp_path):
    check(EIGHT, checkpoint, tmp_path / "results.json", devices=8, limits=FEW)


@pytest.mark.slow
def test_two_processes_generate_as_one(checkpoint, tmp_path):
    check(TWO_PROCESSES, checkpoint, tmp_path / "results.json", 2, processes=2, limits=FEW)


if __name__ == "__main__":
    main(*sys.argv[1:])
