"""The commands of launch/tpu/pod.py, word by word; and its loop on a worker, run for real."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

POD = Path(__file__).parents[2] / "launch" / "tpu" / "pod.py"
SLICE = ("--name", "mine", "--zone", "us-west4-a")


def pod(*arguments):
    return subprocess.run(
        [sys.executable, str(POD), *arguments], capture_output=True, text=True, timeout=60
    )


def commands(*arguments):
    """Returns the commands that a step prints, as lists of words."""
    result = pod(*arguments)
    assert result.returncode == 0, result.stderr
    words, found = shlex.split(result.stdout), []
    for word in words:
        if word in ("gcloud", "git"):
            found.append([])
        found[-1].append(word)
    return found


def test_create_requests_a_slice():
    expected = (
        "gcloud compute tpus queued-resources create mine --zone=us-west4-a --node-id=mine "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert commands("create", *SLICE, "--type", "v5litepod-16", "--spot") == [expected.split()]


@pytest.mark.parametrize(
    "step, rest",
    [
        ("wait", "queued-resources describe mine --zone=us-west4-a --format=value(state.state)"),
        ("delete", "queued-resources delete mine --zone=us-west4-a --force --quiet"),
    ],
)
def test_queue_commands(step, rest):
    assert commands(step, *SLICE) == [["gcloud", "compute", "tpus", *rest.split()]]


def test_setup_copies_installs_and_mounts_on_all_workers():
    archive, copy, install, mount = commands("setup", *SLICE, "--share", "10.0.0.2:/runs")
    assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD"
    ours = ["--zone=us-west4-a", "--worker=all"]
    assert copy == ["gcloud", "compute", "tpus", "tpu-vm", "scp", "jaxtune.tar.gz", "mine:", *ours]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "mine", *ours]
    assert install[:-1] == mount[:-1] == ssh
    assert "pip install -q 'jaxtune.tar.gz[tpu]'" in install[-1]
    assert "mount 10.0.0.2:/runs /runs" in mount[-1]


def test_run_follow_stop_and_resume():
    train = ["--config", "configs/a b.py", "--workdir", "/runs/mine"]
    [run] = commands("run", *SLICE, "--project", "p", "--", *train)
    assert run[5:9] == ["mine", "--zone=us-west4-a", "--project=p", "--worker=all"]
    inner = shlex.split(run[9].removeprefix("--command="))
    script = inner[inner.index("-c") + 1]
    assert "jaxtune train --config 'configs/a b.py' --workdir /runs/mine &" in script
    [resume] = commands("resume", *SLICE, "--workdir", "/runs/mine")
    assert "jaxtune train --workdir /runs/mine &" in resume[-1]
    [follow] = commands("follow", *SLICE)
    assert follow[-2:] == ["--worker=0", "--command=tail -n 50 -F jaxtune.log"]
    [stop] = commands("stop", *SLICE)
    assert "kill -TERM" in stop[-1]


@pytest.mark.parametrize(
    "codes, starts", [("0", 1), ("65", 1), ("75 75 0", 3), ("134 0", 2), ("1", 1)]
)
def test_a_worker_restarts_if_that_can_help(tmp_path, codes, starts):
    """The loop runs with a jaxtune that exits with one code after another."""
    (tmp_path / "codes").write_text(codes.replace(" ", "\n") + "\n")
    binary = tmp_path / "venv" / "bin"
    binary.mkdir(parents=True)
    (binary / "jaxtune").write_text(
        '#!/bin/bash\ncode=$(head -n1 ~/codes); sed -i 1d ~/codes; echo "$@" >> ~/starts\n'
        "exit $code\n"
    )
    (binary / "sleep").write_text("#!/bin/bash\n")
    for name in ("jaxtune", "sleep"):
        (binary / name).chmod(0o755)
    [resume] = commands("resume", *SLICE, "--workdir", "/runs/mine")
    inner = shlex.split(resume[-1].removeprefix("--command="))
    environ = {"HOME": str(tmp_path), "PATH": f"{binary}:/usr/bin:/bin"}
    result = subprocess.run(
        ["bash", "-c", inner[inner.index("-c") + 1]],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (tmp_path / "starts").read_text() == "train --workdir /runs/mine\n" * starts
    assert result.stdout == f"exit code {codes.split()[-1]}\n"


def test_a_missing_argument_is_reported():
    assert "--runtime" in pod("create", *SLICE, "--type", "v9-8").stderr
    assert "after --" in pod("run", *SLICE).stderr
