"""Trains on a Cloud TPU slice: prints the gcloud commands of each step, and runs them with --go.

    python launch/tpu/pod.py create --name mine --zone us-west4-a --type v5litepod-16 [--spot] --go
    python launch/tpu/pod.py wait   --name mine --zone us-west4-a --go
    python launch/tpu/pod.py setup  --name mine --zone us-west4-a --share 10.0.0.2:/runs --go
    python launch/tpu/pod.py run    --name mine --zone us-west4-a --go -- \\
        --config configs/deepseek_llm_7b.py --workdir /runs/mine
    python launch/tpu/pod.py follow --name mine --zone us-west4-a --go
    python launch/tpu/pod.py stop   --name mine --zone us-west4-a --go    # saves, and exits with 75
    python launch/tpu/pod.py resume --name mine --zone us-west4-a --workdir /runs/mine --go
    python launch/tpu/pod.py delete --name mine --zone us-west4-a --go

A slice has several workers; each runs the same command, and jax finds the others. --share is an
NFS share (Filestore) that every worker mounts; the run's directory must be on it. If a spot slice
is taken away, delete and create it again, then setup and resume.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence

TPUS = ("gcloud", "compute", "tpus")
ARCHIVE, LOG, PID = "jaxtune.tar.gz", "jaxtune.log", "jaxtune.pid"
RUNTIMES = {
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# Restarts a run on 75, and at most five times after crashes; every worker runs this loop.
AGAIN = """\
crashes=0
while true; do
  ~/venv/bin/jaxtune train {arguments} & echo $! > {pid}; wait $!; code=$?
  case $code in
    75) [ -e {pid}.stop ] && break ;;
    13[0-9]|14[0-9]) crashes=$((crashes + 1)); [ $crashes -le 5 ] || break ;;
    *) break ;;
  esac
  sleep 20
done
echo "exit code $code"
"""


def _where(arguments: argparse.Namespace) -> list[str]:
    project = [f"--project={arguments.project}"] if arguments.project else []
    return [f"--zone={arguments.zone}", *project]


def _ssh(arguments: argparse.Namespace, command: str, worker: str = "all") -> list[str]:
    name = arguments.name
    ssh = [*TPUS, "tpu-vm", "ssh", name, *_where(arguments), f"--worker={worker}"]
    return [*ssh, f"--command={command}"]


def create(arguments: argparse.Namespace) -> list[list[str]]:
    """Requests a slice; it is created when capacity is available."""
    generation = arguments.type.split("-")[0]
    runtime = arguments.runtime or RUNTIMES.get(generation)
    if runtime is None:
        raise SystemExit(
            f"--type={arguments.type}: unknown TPU generation; set --runtime "
            f"(known: {', '.join(RUNTIMES)})"
        )
    command = [*TPUS, "queued-resources", "create", arguments.name, *_where(arguments)]
    command += [
        f"--node-id={arguments.name}",
        f"--accelerator-type={arguments.type}",
        f"--runtime-version={runtime}",
    ]
    return [command + ["--spot"] * arguments.spot]


def wait(arguments: argparse.Namespace) -> list[list[str]]:
    """Shows the state of the slice, which is ACTIVE when it is ready."""
    described = [*TPUS, "queued-resources", "describe", arguments.name, *_where(arguments)]
    return [[*described, "--format=value(state.state)"]]


def setup(arguments: argparse.Namespace) -> list[list[str]]:
    """Installs the checked-out commit and mounts the share."""
    install = (
        "set -e; sudo apt-get update -q; sudo apt-get install -qy python3-venv nfs-common; "
        f"python3 -m venv ~/venv; ~/venv/bin/pip install -q '{ARCHIVE}[tpu]'"
    )
    target = f"/{arguments.share.partition(':')[2].strip('/')}"
    mount = (
        f"set -e; sudo mkdir -p {shlex.quote(target)}; mountpoint -q {shlex.quote(target)} || "
        f"sudo mount {shlex.quote(arguments.share)} {shlex.quote(target)}"
    )
    copy = [*TPUS, "tpu-vm", "scp", ARCHIVE, f"{arguments.name}:", *_where(arguments)]
    return [
        ["git", "archive", "--format=tar.gz", "--prefix=jaxtune/", f"--output={ARCHIVE}", "HEAD"],
        [*copy, "--worker=all"],
        _ssh(arguments, install),
        _ssh(arguments, mount),
    ]


def run(arguments: argparse.Namespace) -> list[list[str]]:
    """Starts training on all workers, with restarts after interruptions; returns at once."""
    if not arguments.train:
        raise SystemExit("run needs the arguments of jaxtune train after --")
    return [_start(arguments, arguments.train)]


def resume(arguments: argparse.Namespace) -> list[list[str]]:
    """Resumes the run in --workdir."""
    return [_start(arguments, ["--workdir", arguments.workdir])]


def _start(arguments: argparse.Namespace, train: Sequence[str]) -> list[str]:
    script = AGAIN.format(arguments=shlex.join(train), pid=PID)
    # Unpacked into the home directory, so that relative paths of configs are the same as here.
    unpack = f"tar xzf {ARCHIVE} --strip-components=1; rm -f {PID}.stop; "
    return _ssh(
        arguments, f"{unpack}nohup bash -c {shlex.quote(script)} > {LOG} 2>&1 < /dev/null &"
    )


def follow(arguments: argparse.Namespace) -> list[list[str]]:
    """Follows the log of the first worker, which logs for all."""
    return [_ssh(arguments, f"tail -n 50 -F {LOG}", worker="0")]


def stop(arguments: argparse.Namespace) -> list[list[str]]:
    """Makes the run save and exit."""
    return [_ssh(arguments, f"touch {PID}.stop; kill -TERM $(cat {PID})")]


def delete(arguments: argparse.Namespace) -> list[list[str]]:
    """Deletes the slice; the share is kept."""
    command = [*TPUS, "queued-resources", "delete", arguments.name, *_where(arguments)]
    return [[*command, "--force", "--quiet"]]


STEPS: dict[str, Callable[[argparse.Namespace], list[list[str]]]] = {
    step.__name__: step for step in (create, wait, setup, run, follow, stop, resume, delete)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the commands of a step and runs them with --go; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
    for name, step in STEPS.items():
        each = steps.add_parser(name, help=step.__doc__)
        each.add_argument("--name", required=True, help="name of the slice")
        each.add_argument("--zone", required=True, help="zone, such as us-west4-a")
        each.add_argument("--project", default="", help="project (default: that of gcloud)")
        each.add_argument("--go", action="store_true", help="run the commands (default: print)")
        if name == "create":
            each.add_argument(
                "--type", required=True, help="accelerator type, such as v5litepod-16 or v6e-64"
            )
            each.add_argument(
                "--runtime", default="", help="runtime version of the VMs (default: by type)"
            )
            each.add_argument(
                "--spot", action="store_true", help="request spot capacity, which can be preempted"
            )
        if name == "setup":
            each.add_argument(
                "--share", required=True, help="NFS share HOST:/PATH, mounted at /PATH"
            )
        if name == "resume":
            each.add_argument("--workdir", required=True, help="directory of the run, on the share")
        if name == "run":
            each.add_argument(
                "train",
                nargs=argparse.REMAINDER,
                metavar="-- ARGUMENTS",
                help="arguments of jaxtune train",
            )
    arguments = parser.parse_args(argv)
    if arguments.step == "run":
        arguments.train = arguments.train[arguments.train[:1] == ["--"] :]
    for command in STEPS[arguments.step](arguments):
        print(shlex.join(command), flush=True)
        if arguments.go and (code := subprocess.call(command)):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
