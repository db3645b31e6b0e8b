"""The launcher of several processes on one machine, with small programs in place of a run."""

import importlib.util
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[2] / "launch" / "local.py"
# What process 1 does; the others sleep until they are told to end.
SLEEP = "import time; time.sleep(100)"


def launch(program, *flags, processes=3):
    command = [sys.executable, str(LOCAL), "--processes", str(processes), *flags]
    return subprocess.Popen(
        [*command, "--", sys.executable, "-c", f"import os, sys\n{program}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def only_first(action):
    return f"if os.environ['JAXTUNE_PROCESS'] == '1':\n  {action}\n{SLEEP}"


def test_every_process_knows_its_number_and_prefixes_its_lines():
    program = "print(*(os.environ[f'JAXTUNE_{k}'] for k in ('PROCESS', 'PROCESSES')))"
    process = launch(f"{program}; print(os.environ['JAXTUNE_COORDINATOR'], file=sys.stderr)")
    output, _ = process.communicate(timeout=60)
    lines = output.splitlines()
    assert process.returncode == 0
    assert {f"[{i}] {i} 3" for i in range(3)} < set(lines)
    assert len({line.split("localhost:")[1] for line in lines if "localhost:" in line}) == 1


def test_devices_are_split_between_processes():
    process = launch("print(os.environ['JAX_LOCAL_DEVICE_IDS'])", "--devices-per-process", "2")
    assert "[2] 4,5\n" in process.communicate(timeout=60)[0]


@pytest.mark.parametrize(
    "action, code",
    [
        ("sys.exit(65)", 65),
        ("raise ValueError('broken')", 1),
        ("sys.exit(75)", 75),
        ("os.abort()", 75),
        ("os.kill(os.getpid(), 9)", 75),
    ],
)
def test_one_failure_ends_all_with_its_code(action, code):
    begin = time.monotonic()
    process = launch(only_first(action), "--grace", "1")
    process.communicate(timeout=60)
    assert process.returncode == code
    assert time.monotonic() - begin < 20


def test_a_stopped_process_is_ended_too():
    program = (
        "import signal\n"
        "if os.environ['JAXTUNE_PROCESS'] == '0':\n  sys.exit(75)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    process = launch(program, "--grace", "1")
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_signals_are_passed_on():
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready'); time.sleep(100)"
    )
    process = launch(program)
    for _ in range(3):
        assert "ready" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75


def test_a_missing_command_is_an_error():
    process = subprocess.run(
        [sys.executable, str(LOCAL), "--processes", "2"], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert "a command after --" in process.stderr


def test_exit_code_65_has_precedence_over_75_and_both_over_others():
    spec = importlib.util.spec_from_file_location("local", LOCAL)
    local = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(local)
    assert local.exit_code([0, 0]) == 0
    assert local.exit_code([75, -9, 65]) == 65
    assert local.exit_code([1, -signal.SIGKILL]) == 75
    assert local.exit_code([3, 0]) == 3
