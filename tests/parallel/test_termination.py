"""Signals end a process that has nothing to save, also in the middle of C++ or Rust code."""

import signal
import subprocess
import sys
import time

import pytest

from jaxtune.parallel import termination

BEGIN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
from jaxtune.cli import one_line_errors
from jaxtune.parallel import termination
with one_line_errors():
    termination.install()
"""
SLEEP = """
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("cleaned")
"""
IN_AN_EXCEPTION = """
    try:
        print("ready", flush=True)
        time.sleep(600)
    except BaseException:
        raise ImportError("as an import of C code reports it")
"""
IMPORT = """
    sys.path.insert(0, sys.argv[1])
    import slow
"""
COMPILE = """
    import jax
    import jax.numpy as jnp
    def deep(x):
        for index in range(2000):
            x = jnp.sin(x) @ x + jnp.sort(x, axis=index % 2)
        return x
    lowered = jax.jit(deep).lower(jnp.ones((8, 8)))
    print("ready", flush=True)
    lowered.compile()
"""
TOKENIZE = """
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    text = "a b " * 5_000_000
    print("ready", flush=True)
    tokenizer.encode_batch([text])
"""
FORK = """
    import os
    child = os.fork()
    if child == 0:
        time.sleep(600)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    time.sleep(2 * termination.GRACE_SECONDS)
    print("unharmed")
"""

MASK = """
    import os
    for blocked in (set(), {signal.SIGTERM}, {signal.SIGTERM, signal.SIGUSR1}):
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        child = os.fork()
        same = signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked
        if child == 0:
            os._exit(0 if same else 1)
        print(same, os.waitpid(child, 0)[1])
"""


def end(program, number, *arguments, later=0.0):
    """Sends a signal to a program some seconds after it is ready.

    Returns the exit code, the output, the errors and the seconds from the signal to the end.
    """
    with subprocess.Popen(
        [sys.executable, "-c", BEGIN + program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(later)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(number)
        output, errors = process.communicate(timeout=120)
        return process.returncode, output, errors, time.monotonic() - begin


EXPECTED = {
    signal.SIGTERM: (75, "stopped by SIGTERM, with nothing to save; run the same command again"),
    signal.SIGINT: (130, "interrupted"),
}


@pytest.mark.parametrize("number", EXPECTED)
def test_a_signal_is_one_line_after_the_clean_up(number):
    code, message = EXPECTED[number]
    found, output, errors, seconds = end(SLEEP, number)
    assert (found, output, errors) == (code, "cleaned\n", f"jaxtune: error: {message}\n")
    assert seconds < 10  # the bar is 5 on an idle machine


def test_another_exception_on_the_way_is_not_shown():
    code, message = EXPECTED[signal.SIGTERM]
    found, _, errors, _ = end(IN_AN_EXCEPTION, signal.SIGTERM)
    assert (found, errors) == (code, f"jaxtune: error: {message}\n")


def test_an_import_is_not_interrupted_by_an_exception(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nprint('ready', flush=True)\n"
        "try:\n    time.sleep(600)\nfinally:\n    print('interrupted', flush=True)\n"
    )
    code, message = EXPECTED[signal.SIGTERM]
    found, output, errors, seconds = end(IMPORT, signal.SIGTERM, str(tmp_path))
    assert (found, output, errors) == (code, "", f"jaxtune: error: {message}\n")
    assert seconds < 10  # the bar is 5 on an idle machine


@pytest.mark.slow
@pytest.mark.parametrize("number", EXPECTED)
@pytest.mark.parametrize("program", [COMPILE, TOKENIZE], ids=["compiling", "tokenizing"])
def test_a_signal_ends_code_that_python_does_not_interrupt(program, number):
    code, message = EXPECTED[number]
    found, _, errors, seconds = end(program, number, later=1.0)
    assert (found, errors) == (code, f"jaxtune: error: {message}\n")
    assert seconds < 10  # the bar is 5 on an idle machine


@pytest.mark.slow
def test_a_signal_to_a_forked_process_does_not_end_its_parent():
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + FORK], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "unharmed\n"


def test_a_fork_keeps_the_signals_that_were_blocked():
    program = [sys.executable, "-c", BEGIN + MASK]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True 0\n" * 3, done.stderr


def test_a_process_that_jaxtune_does_not_own_keeps_its_handlers():
    assert not termination.installed()
    termination.finish_if_received()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
