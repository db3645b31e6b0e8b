"""Runs of several processes on this machine, started as users start them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LOCAL = HERE.parents[1] / "launch" / "local.py"
HEARTBEAT = 10


def read_losses(workdir):
    """Returns what a run has computed, step by step, as its log has it."""
    path = Path(workdir) / "metrics.jsonl"
    kept = ("step", "loss", "grad_norm", "tokens", "rows", "batch")
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{name: line[name] for name in kept} for line in lines]


class Running:
    """A launcher with its run, of which single processes can be reached."""

    def __init__(self, processes, arguments, *, devices, fault, grace):
        self.workdir = Path(arguments[arguments.index("--workdir") + 1])
        self._signalled = self.workdir.with_name(f"{self.workdir.name}-signalled")
        command = [sys.executable, str(HERE / "faulty.py"), "train", *map(str, arguments)]
        launcher = [sys.executable, str(LOCAL), "--processes", str(processes)]
        launcher += ["--grace", str(grace)]
        self._process = subprocess.Popen(
            [*launcher, "--", *command, "--heartbeat", str(HEARTBEAT)],
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAXTUNE_FAULT": fault,
                "JAXTUNE_SIGNALLED": str(self._signalled),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_steps(self, count):
        """Waits until the log has a number of lines."""
        while len(read_losses(self.workdir)) < count:
            self.wait_a_moment()

    def wait_a_moment(self):
        """Waits for what a run is about to do; fails if it has ended."""
        assert self._process.poll() is None, self._process.communicate()[0]
        time.sleep(0.02)

    def send(self, number, process=None):
        """Sends a signal to one process of the run, or to the launcher."""
        os.kill(self._pid(process), number)
        self._signalled.touch()

    def _pid(self, process):
        if process is None:
            return self._process.pid
        for entry in Path(f"/proc/{self._process.pid}/task").iterdir():
            for child in (entry / "children").read_text().split():
                environ = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                if f"JAXTUNE_PROCESS={process}".encode() in environ:
                    return int(child)
        raise AssertionError(f"no process {process}")

    def succeed(self):
        """Returns all output of a run that ends well."""
        code, output = self.finish()
        assert code == 0, output
        return output

    def stop(self):
        """Ends the run if it has not ended."""
        if self._process.poll() is None:
            self._signalled.touch()  # a process that waits for it would not react
            self._process.terminate()
            self._process.wait(60)

    def finish(self, timeout=240):
        """Returns the exit code and all output."""
        output, _ = self._process.communicate(timeout=timeout)
        return self._process.returncode, output
