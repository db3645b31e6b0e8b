"""A real SLURM of two nodes on this machine runs launch/slurm/train.sbatch: `make test-slurm`."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import read_losses

pytestmark = pytest.mark.skipif(
    "JAXTUNE_TEST_SLURM" not in os.environ, reason="needs root and SLURM: make test-slurm"
)
SCRIPT = Path(__file__).parents[2] / "launch" / "slurm" / "train.sbatch"
NODES = {"jaxtune-1": 16821, "jaxtune-2": 16822}  # names in /etc/hosts, and ports
CONF = """\
ClusterName=jaxtune
SlurmctldHost=localhost
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"


def wait_until(true, seconds=240):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.5)


class Cluster:
    """SLURM's commands, for one job at a time."""

    def __init__(self, directory):
        self.directory = directory
        self.environ = os.environ | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "JAX_PLATFORMS": "cpu",
            "JAXTUNE": f"{sys.executable} {Path(__file__).with_name('faulty.py')}",
            "JAXTUNE_FAULT": "pause",
        }

    def command(self, *arguments):
        return subprocess.run(
            [*map(str, arguments)],
            env=self.environ,
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    def submit(self, *arguments):
        return re.findall(r"\d+", self.command("sbatch", SCRIPT, *arguments))[-1]

    def job(self, number):
        """Returns what SLURM knows of a job, by name."""
        shown = self.command("scontrol", "show", "job", number)
        return dict(pair.split("=", 1) for pair in shown.split() if "=" in pair)

    def log(self, number):
        return (self.directory / f"jaxtune-{number}.log").read_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    directory = tmp_path_factory.mktemp("slurm")
    (directory / "state").mkdir()
    nodes = "\n".join(NODE.format(name=name, port=port) for name, port in NODES.items())
    conf = CONF.format(directory=directory, nodes=nodes, names=",".join(NODES))
    (directory / "slurm.conf").write_text(conf)
    environ = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}
    daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        subprocess.run(["install", "-d", "-o", "munge", "/run/munge"], check=True)
        daemons.insert(0, ["runuser", "-u", "munge", "--", "munged", "--foreground"])
    running = []
    with (directory / "daemons.log").open("w") as log:
        for daemon in daemons:
            running.append(subprocess.Popen(daemon, env=environ, stdout=log, stderr=log))
            time.sleep(1)
    cluster = Cluster(directory)
    try:
        wait_until(lambda: cluster.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        yield cluster
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(60)


def test_a_terminated_job_is_requeued_and_ends_as_an_unbroken_run(
    cluster, start, small_config, tmp_path
):
    flags = ("--config.training.steps=12", "--config.training.batch_size=8")
    flags += ("--config.checkpoint.every=4", "--config.evaluation.every=6")
    workdir = tmp_path / "run"
    job = cluster.submit("--config", small_config, *flags, "--workdir", workdir)
    wait_until(lambda: len(read_losses(workdir)) >= 3)
    cluster.command("scancel", "--signal=TERM", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1")
    assert "exit code 75: back to the queue" in cluster.log(job)
    # SLURM lets a requeued job wait for two minutes.
    wait_until(lambda: cluster.job(job)["JobState"] == "PENDING")
    cluster.command("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED")
    assert "resuming after step" in cluster.log(job)
    start(2, tmp_path / "unbroken").succeed()
    assert read_losses(workdir) == read_losses(tmp_path / "unbroken")


def test_a_mistake_ends_the_job(cluster, small_config, tmp_path):
    job = cluster.submit(
        "--config", small_config, "--config.training.stepz=1", "--workdir", tmp_path / "run"
    )
    wait_until(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))
    shown = cluster.job(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "65:0", "0")
    assert 'did you mean "training.steps"' in cluster.log(job)
