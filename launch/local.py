"""Starts the processes of a run on this machine, and stops all of them when one fails.

    python launch/local.py --processes 4 -- jaxtune train --config configs/quickstart.py --workdir r

Every line of output is prefixed with the number of its process. SIGINT and SIGTERM are forwarded;
after SIGTERM, the run saves a checkpoint and exits with code 75.

The exit code is 0 if all processes succeed, 65 if the same command would fail again, and 75 if the
same command resumes the run (a process was killed, stuck or preempted); otherwise it is that of the
first process that failed. After a failure, the other processes have --grace seconds to exit before
they are killed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

DO_NOT_RETRY, RETRY = 65, 75


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the processes and returns the exit code of the launcher."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--processes", type=int, required=True, metavar="N", help="number of processes"
    )
    parser.add_argument(
        "--devices-per-process",
        type=int,
        metavar="K",
        help="GPUs of each process: the first K for process 0, and so on",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time that the other processes have to exit after a failure (default: 30)",
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command of each process"
    )
    arguments = parser.parse_args(argv)
    command = arguments.command[arguments.command[:1] == ["--"] :]
    if not command or arguments.processes < 1:
        parser.error("--processes of at least 1 and a command after -- are required")
    reserved = _reserve_port()
    port = reserved.getsockname()[1]
    workers = [
        _start(command, _environment(number, port, arguments))
        for number in range(arguments.processes)
    ]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: _send(workers, received))
    printing = [
        threading.Thread(target=_relay, args=(number, worker))
        for number, worker in enumerate(workers)
    ]
    for thread in printing:
        thread.start()
    codes = _wait(workers, arguments.grace)
    for thread in printing:
        thread.join()
    reserved.close()
    return exit_code(codes)


def exit_code(codes: Sequence[int]) -> int:
    """Returns the exit code of the launcher.

    A process that was ended by a signal counts as `RETRY`.

    Args:
      codes: exit codes of the processes, in the order of exit.
    """
    failed = [RETRY if code < 0 or code == 128 + signal.SIGABRT else code for code in codes if code]
    for code in (DO_NOT_RETRY, RETRY):
        if code in failed:
            return code
    return failed[0] if failed else 0


def _reserve_port() -> socket.socket:
    """Returns a socket that keeps a port from other programs while process 0 listens on it.

    It does not listen itself, and SO_REUSEPORT lets a process of the same user do so.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(("localhost", 0))
    return reserved


def _environment(number: int, port: int, arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of process `number`."""
    added = {
        "JAXTUNE_COORDINATOR": f"localhost:{port}",
        "JAXTUNE_PROCESSES": str(arguments.processes),
        "JAXTUNE_PROCESS": str(number),
        "PYTHONUNBUFFERED": "1",
    }
    if (share := arguments.devices_per_process) is not None:
        mine = range(number * share, (number + 1) * share)
        added["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, mine))
    return os.environ | added


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    # In a new session, so that Ctrl-C on a terminal reaches the process once, forwarded from here.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _relay(number: int, worker: subprocess.Popen[str]) -> None:
    """Prints the output of process `number`, line by line, with its number as prefix."""
    assert worker.stdout is not None
    for line in worker.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def _wait(workers: Sequence[subprocess.Popen[str]], grace: float) -> list[int]:
    """Returns exit codes in the order of exit; kills processes that exceed the grace period.

    The result does not include the killed processes.
    """
    running, codes, deadline = list(workers), [], float("inf")
    while running and time.monotonic() < deadline:
        for worker in [worker for worker in running if worker.poll() is not None]:
            running.remove(worker)
            codes.append(worker.returncode)
            if worker.returncode:
                deadline = min(deadline, time.monotonic() + grace)
        time.sleep(0.1)
    _send(running, signal.SIGKILL)
    for worker in running:
        worker.wait()
    return codes


def _send(workers: Sequence[subprocess.Popen[str]], number: int) -> None:
    """Sends a signal to the process groups of all running processes."""
    for worker in workers:
        if worker.poll() is None:
            os.killpg(worker.pid, number)


if __name__ == "__main__":
    sys.exit(main())
