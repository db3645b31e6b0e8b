"""The batch script of SLURM, with an `srun` that ends with a given exit code."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
COMMANDS = {
    "srun": 'echo "$@" > ran; [ -z "$FAILURE" ] || echo "$FAILURE" > "$JAXTUNE_REASON"; exit $CODE',
    "scontrol": 'echo "$@" > requeued',
    "sleep": "",
}


@pytest.mark.parametrize(
    "code, failure, restarts, ends, requeued",
    [
        (0, "", 0, 0, False),
        (1, "", 0, 1, False),
        (65, "", 0, 65, False),
        (75, "", 40, 75, True),
        (134, "", 4, 134, True),
        (137, "", 4, 137, True),
        (134, "", 5, 134, False),
        (134, "65 RuntimeError: no", 0, 65, False),
        (134, "75 lost another process", 0, 134, True),
    ],
)
def test_a_job_is_requeued_where_that_can_help(tmp_path, code, failure, restarts, ends, requeued):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "jaxtune-7.reason").write_text("65 of an earlier start\n")
    done = subprocess.run(
        ["bash", str(SCRIPT), "--workdir", "runs/mine"],
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
            "CODE": str(code),
            "FAILURE": failure,
        },
        timeout=60,
    )
    assert done.returncode == ends
    assert (tmp_path / "ran").read_text().endswith("jaxtune train --workdir runs/mine\n")
    assert (tmp_path / "requeued").exists() == requeued
