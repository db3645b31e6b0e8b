"""SIGTERM ends commands that have nothing to save."""

import signal
import subprocess
import sys


def test_sigterm_ends_a_command_other_than_train(tmp_path):
    waits = tmp_path / "scores.py"  # eval runs this file after it has joined the processes
    waits.write_text('import time\nprint("waiting", flush=True)\ntime.sleep(120)\n')
    command = [sys.executable, "-m", "jaxtune.cli", "eval", "--workdir", "none"]
    command += ["--scores", str(waits), "--generate", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 75
            assert errors == (
                "jaxtune: error: stopped by SIGTERM, with nothing to save; run the same command "
                "again\n"
            )
        finally:
            process.kill()
