"""Commands on a finished run, in two processes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from runs import HERE, LOCAL

import jaxtune
from jaxtune.cli import main

pytestmark = pytest.mark.slow

# Sums over devices come in another order in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def workdir(start, tmp_path_factory):
    """A run of two processes over a quantized base that is split between them."""
    workdir = tmp_path_factory.mktemp("exported") / "run"
    flags = ("--config.mesh.fsdp=2", "--config.quantize.format=int8", "--config.training.steps=4")
    start(2, workdir, *flags).succeed()
    return workdir


def run(*arguments):
    """Runs a command in two processes; returns the exit code and all output."""
    command = [sys.executable, str(HERE / "faulty.py"), *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, str(LOCAL), "--processes", "2", "--", *command],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_one_process_writes_the_export_that_one_alone_writes(workdir, tmp_path):
    export = ["export", "--workdir", str(workdir), "--format", "merged", "--quantized", "--to"]
    code, output = run(*export, tmp_path / "two")
    assert code == 0, output
    assert output.count("written:") == 1
    main([*export, str(tmp_path / "one")])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    reports = [
        json.loads((tmp_path / place / "merge_report.json").read_text()) for place in ("two", "one")
    ]
    losses = [report.pop("loss") for report in reports]
    assert reports[0] == reports[1]
    assert losses[0] == pytest.approx(losses[1], rel=TOLERANCE)


def test_an_export_that_another_process_cannot_read_is_named(workdir, tmp_path):
    export = ["export", "--workdir", workdir, "--format", "merged", "--quantized", "--to"]
    code, output = run(*export, tmp_path / "process-{process}")
    assert code == 65, output
    assert "process-1: written by process 0 but not visible to another process" in output
    assert "Traceback" not in output


def test_an_error_of_the_process_that_writes_reaches_the_other(workdir, tmp_path):
    taken = tmp_path / "file-0"
    taken.touch()
    export = ["export", "--workdir", workdir, "--format", "merged", "--to"]
    code, output = run(*export, tmp_path / "file-{process}" / "inside")
    assert code == 65 and "Traceback" not in output
    assert f"{taken / 'inside'}: cannot create: {taken} is not a directory" in output
    assert "[1] jaxtune: error: process 0 failed" in output


def test_an_evaluation_gives_the_scores_of_one_process(workdir):
    code, output = run("eval", "--workdir", workdir, "--json")
    assert code == 0, output
    (line,) = [line for line in output.splitlines() if line.startswith("[0] {")]
    ours = json.loads(line.removeprefix("[0] "))
    assert ours["loss"] == pytest.approx(jaxtune.Run(workdir).evaluations()[-1]["loss"], rel=1e-6)


def test_a_run_of_two_devices_is_used_on_one(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "copy")
    run = jaxtune.Run(copy)
    assert run.config.mesh.fsdp == 2
    model = run.model()
    assert model.mesh.size == 1
    assert model.generate(["c2"], 4)
