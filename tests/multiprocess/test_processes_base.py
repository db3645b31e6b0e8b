"""Several processes hash the base together, and each notices what it reads."""

import json
import shutil

import pytest

from jaxtune.checkpoints.blocks import hash_file

pytestmark = pytest.mark.slow


def test_a_changed_base_is_refused_by_any_number_of_processes(start, tiny_chat, tmp_path):
    base, workdir = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_chat, base)
    flags = (f"--config.model.path={base}", "--config.training.steps=4", "--config.mesh.data=1")
    start(2, workdir, *flags, "--config.mesh.fsdp=2").succeed()
    record = json.loads((workdir / "fingerprint.json").read_text())
    for name, file in record["base"]["files"].items():
        assert file["hashes"] == hash_file(base / name), name
    start(1, workdir, resume=True).succeed()  # all blocks are compared by one process
    record = json.loads((workdir / "fingerprint.json").read_text())
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 16
    weights.write_bytes(content)
    for processes in (1, 2):
        code, output = start(processes, workdir, resume=True).finish()
        assert code == 65 and "Traceback" not in output, output
        assert "has changed: model.safetensors differs within bytes 0–" in output
    again = json.loads((workdir / "fingerprint.json").read_text())
    assert again == record
    start(2, workdir, "--accept-changes=model", resume=True).succeed()
