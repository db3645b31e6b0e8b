"""Commands of jaxtune in processes of their own that start without the time of the imports.

A server imports jaxtune once and forks for each command, before JAX has started a backend. Every
command is a process like any other: it has its own number, is killed by signals, and its memory,
threads and locks end with it. Run as a program, this file is the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Command:
    """A command of jaxtune in a process of its own, with the methods of `subprocess.Popen`."""

    def __init__(self, server, pid, output):
        self.server, self.pid, self.returncode, self._output = server, pid, None, output

    def poll(self):
        """Returns the exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, seconds=120):
        """Returns the exit code, or fails after a number of seconds."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < deadline, f"still running:\n{self.output()}"
            time.sleep(0.005)
        return self.returncode

    def until(self, condition, seconds=120):
        """Waits until `condition()` is true; fails if the process ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, f"exit code {self.returncode}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.output()}"
            time.sleep(0.0005)

    def send_signal(self, number):
        """Sends a signal, if the process has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        """Kills the process and waits for its end."""
        self.send_signal(signal.SIGKILL)
        return self.wait()

    def output(self):
        """Returns what the process has printed."""
        return self._output.read_text(errors="replace")


class Server:
    """The process that forks; use it as a context manager."""

    def __init__(self, directory, prefix=()):
        """Starts the server.

        Args:
          directory: where the output of the commands is kept.
          prefix: command that runs the server, such as one that mounts a disk for it.
        """
        self._directory, self._started = Path(directory), []
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__))],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request):
        """Sends a request and returns the answer; both are JSON values."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, *arguments, fault=None, environ=None):
        """Starts a command.

        Args:
          arguments: command line without the program's name.
          fault: name of a function in `injected` that the process calls first.
          environ: environment variables to add.
        """
        output = self._directory / f"output-{len(self._started)}.txt"
        output.touch()
        request = {"arguments": [*map(str, arguments)], "output": str(output), "fault": fault}
        pid = self.ask(request | {"environ": environ or {}})
        self._started.append(Command(self, pid, output))
        return self._started[-1]

    def start_all(self, processes, *arguments, heartbeat=10, **options):
        """Starts a command in several processes, which find each other; returns them in order."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        join = ("--coordinator", address, "--processes", processes, "--heartbeat", heartbeat)
        return [
            self.start(*arguments, *join, "--process", number, **options)
            for number in range(processes)
        ]

    def run(self, *arguments, code=0, **options):
        """Runs a command to its end and returns its output; checks the exit code."""
        command = self.start(*arguments, **options)
        assert command.wait() == code, command.output()
        return command.output()

    def seen(self, path):
        """Returns the path of a file that the server sees, which may have disks of its own."""
        return Path(f"/proc/{self._process.pid}/root{path}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for command in self._started:
            if command.poll() is None:
                command.kill()
        self._process.communicate()


def _serve():
    sys.modules["torch"] = None  # type: ignore[assignment]  # as where jaxtune is alone
    import jaxtune.cli
    import jaxtune.training.train  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif not (answer := os.fork()):
            _become(**request)
            return  # this process ends as a program does
        print(json.dumps(answer), flush=True)


def _become(arguments, output, fault, environ):
    """Runs a command in this process."""
    import jax

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
        os.dup2(target, number)
    os.environ.update(environ)
    for name in {"JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES"} & environ.keys():
        value = environ[name]  # jax has been imported, which reads them
        jax.config.update(name.lower(), int(value) if value.isdigit() else value)
    sys.argv = ["jaxtune", *arguments]
    if fault is not None:
        import injected

        getattr(injected, fault)()
    from jaxtune.cli import main

    main()


if __name__ == "__main__":
    _serve()
