"""A base from the hub: the commit is resolved once, and the run keeps it when the branch moves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMITS = ("a" * 40, "b" * 40)


def lay_out(cache, model, commit, temperature):
    """Adds a snapshot of a model to a cache, laid out as the hub's client does, and moves main."""
    repository = cache / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for path in model.iterdir():
        content = path.read_bytes()
        if path.name == "generation_config.json":
            content = json.dumps(json.loads(content) | {"temperature": temperature}).encode()
        blob = repository / "blobs" / f"{commit[0]}-{path.name}"
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


SCRIPT = """
import json, sys
import jaxtune
from jaxtune.errors import JaxtuneError
for call in json.loads(sys.stdin.read()):
    try:
        if "read" in call:
            run = jaxtune.Run(call["read"])
            print("read", run._base.directory.name, run.model().tokenizer is not None)
        else:
            jaxtune.train(**call, progress=False)
            print("trained")
    except JaxtuneError as error:
        print("error:", error)
"""


@pytest.fixture
def calls(tmp_path):
    """Runs calls of `jaxtune.train` in a process that sees the cache alone; returns its lines."""

    def run(*calls):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input=json.dumps(calls),
            env=os.environ
            | {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
            | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        words = ("trained", "read ", "error: ")
        return [line for line in done.stdout.splitlines() if line.startswith(words)]

    return run


@pytest.mark.slow
def test_a_moved_branch_changes_nothing_for_a_run(calls, tiny_chat, chats, tmp_path):
    lay_out(tmp_path / "cache", tiny_chat, COMMITS[0], 0.5)
    config = {
        "model": {"path": "someone/model"},
        "data": {"train": str(chats), "max_length": 64},
        "adapter": {"rank": 4},
        "training": {"steps": 1, "batch_size": 4, "dtype": "float32"},
        "logging": {"tensorboard": False},
    }
    workdir = str(tmp_path / "run")
    assert calls({"config": config, "workdir": workdir})[-1] == "trained"
    record = json.loads(Path(workdir, "fingerprint.json").read_text())
    assert (record["base"]["commit"], record["base"]["path"]) == (COMMITS[0], "someone/model")
    lay_out(tmp_path / "cache", tiny_chat, COMMITS[1], 0.7)
    longer = config | {"training": config["training"] | {"steps": 2}}
    other = longer | {"model": {"path": "someone/model", "revision": "main"}}
    lines = calls(
        {"workdir": workdir},
        {"config": longer, "workdir": workdir},
        {"read": workdir},
        {"config": other, "workdir": workdir},
        {"config": longer, "workdir": str(tmp_path / "new")},
    )
    assert lines[:3] == ["trained", "trained", f"read {COMMITS[0]} True"]
    assert "the base model someone/model has changed: generation_config.json" in lines[3]
    assert lines[4] == "trained"
    fresh = json.loads((tmp_path / "new" / "fingerprint.json").read_text())
    assert fresh["base"]["commit"] == COMMITS[1]
    # Without the snapshot of the run there is no other base in its place.
    shutil.rmtree(tmp_path / "cache/models--someone--model/snapshots" / COMMITS[0])
    (line,) = calls({"workdir": workdir})
    assert line.startswith(f"error: someone/model (revision {COMMITS[0]}): ")
