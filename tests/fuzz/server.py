"""Runs malformed inputs, each in a fork of this process, and judges what they do.

The process has imported everything and has not started a backend of JAX, whose threads a fork would
lose. A case takes only the time of its own work, and its memory is measured alone.
"""

import contextlib
import os
import re
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

SECONDS, MEMORY = 20, 2**30  # of processor time, and of resident memory
PATIENCE = 3 * SECONDS  # wall time, on a machine that is busy with other tests
_ADDRESSES = 6 * 2**30  # address space beyond that of this process


class Outcome(NamedTuple):
    """What a case did.

    Attributes:
      verdict: "refused", "accepted", or what is wrong.
      seconds: processor time.
      memory: peak of the resident memory beyond that of this process when it forked, in bytes.
      output: end of what it printed.
    """

    verdict: str
    seconds: float
    memory: int
    output: str

    @property
    def passed(self):
        return self.verdict in ("refused", "accepted")


def warm_up(cache):
    """Imports everything; `cache` is the directory of compiled functions."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "COLUMNS": "80",
    }
    sys.modules["torch"] = None  # type: ignore[assignment]  # as where jaxtune is alone
    import datasets  # noqa: F401
    import jax
    import pyarrow.csv
    import pyarrow.parquet  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import jaxtune.cli
    import jaxtune.training.train  # noqa: F401

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def run(case, directory, root, marker):
    """Runs a case in a fork.

    Args:
      case: a `kinds.Case`, whose files are in `directory`.
      directory: the only place where the case may write.
      root: parent of `directory`, in which nothing else may appear.
      marker: a file that malicious inputs create if they are executed.
    """
    output = directory.with_suffix(".txt")
    before = _entries(root)
    resident = _status("VmRSS")
    deadline = time.monotonic() + PATIENCE
    pid = os.fork()
    if not pid:
        _become(case, directory, output)
    status, usage, late = _wait(pid, deadline)
    seconds = usage.ru_utime + usage.ru_stime
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # processes that it left
    text = output.read_text(errors="replace")
    output.unlink()
    memory = max(0, usage.ru_maxrss * 1024 - resident)
    verdict = (
        f"more than {SECONDS} s"
        if late or seconds > SECONDS
        else _judge(os.waitstatus_to_exitcode(status), text)
    )
    if memory > MEMORY:
        verdict = f"more than {MEMORY >> 20} MiB"
    if marker.exists() or (directory / "marker").exists():
        verdict = "executed"
        marker.unlink(missing_ok=True)
    if strange := _entries(root) - before:
        verdict = f"wrote {', '.join(sorted(strange))}"
    return Outcome(verdict, seconds, memory, text[-3000:])


def _entries(root):
    return {entry.name for entry in os.scandir(root)} - {"cache"}


def _status(key):
    """Returns an entry of /proc/self/status in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def _wait(pid, deadline):
    """Returns status and resources of a process, and whether it had to be killed."""
    late = False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage, late
        if not late and time.monotonic() > deadline:
            late = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.003)


def _judge(code, text):
    lines = [line for line in text.splitlines() if line.startswith("jaxtune: error: ")]
    if "Traceback (most recent call last)" in text or "Fatal Python error" in text:
        last = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        return f"traceback: {(last or ['?'])[-1][:150]}"
    if code == 0:
        return "accepted"
    if code == 65:
        return "refused" if len(lines) == 1 else f"{len(lines)} lines of error"
    return f"exit code {code}"


def _become(case, directory, output):
    """Runs the case in this process, which ends without returning."""
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, target in enumerate((os.open(os.devnull, os.O_RDONLY), file, file)):
            os.dup2(target, number)
        os.chdir(directory)
        limit = _status("VmSize") + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        from jaxtune import cli

        if callable(case.command):
            with cli.one_line_errors():
                case.command()
        else:
            cli.main(case.command)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
