"""Each process reads only the parts of a quantized mixture that its devices hold."""

import json
import re

import numpy as np
import pytest
from runs import read_losses
from safetensors import safe_open

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5  # sums over devices come in another order in float32


def share_of(name, fsdp, expert):
    """The share of a tensor that a process with one device has to read."""
    routed = ".mlp.experts." in name
    # The hidden dimension is split: rows of what leads back to it; of the others all rows are
    # read, for codes are made from whole ones.
    if name.endswith(("down_proj.weight", "o_proj.weight")):
        return 1 / fsdp / (expert if routed else 1)
    if routed:
        return 1 / expert
    plain = name.startswith(("model.embed_tokens", "lm_head")) or name.endswith("mlp.gate.weight")
    return 1 / fsdp if plain else 1


def test_experts_and_rows_of_other_processes_are_not_read(start, families, tmp_path):
    model, rows = families("deepseek_v2"), tmp_path / "rows.jsonl"
    generator = np.random.default_rng(0)
    lines = [generator.integers(3, 160, 12).tolist() for _ in range(16)]
    rows.write_text("".join(json.dumps({"input_ids": x, "labels": x}) + "\n" for x in lines))
    flags = [
        f"--config.model.path={model}",
        f"--config.data.train={rows}",
        "--config.data.eval=",
        "--config.data.packing=false",
        "--config.quantize.format=int4",
        "--config.training.steps=4",
    ]
    start(1, tmp_path / "alone", *flags).succeed()
    mesh = [f"--config.mesh.{axis}={n}" for axis, n in (("data", 1), ("fsdp", 2), ("expert", 2))]
    output = start(4, tmp_path / "run", *flags, *mesh).succeed()
    ours, theirs = (
        [line["loss"] for line in read_losses(tmp_path / name)] for name in ("run", "alone")
    )
    assert len(ours) == 4
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE)
    read = {int(p): int(n) for p, n in re.findall(r"process (\d): (\d+) bytes of weights", output)}
    with safe_open(model / "model.safetensors", "numpy") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    expected = sum(size * share_of(name, 2, 2) for name, size in sizes.items())
    assert read == dict.fromkeys(range(4), expected)
