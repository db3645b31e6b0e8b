"""Failures of one process among several: all of them exit with its reason and its exit code.

Otherwise the others would wait in a collective until the heartbeat times out, and then abort
without a reason. The first failing process publishes its error in the key-value store of JAX's
coordinator, which a thread of every process polls.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax

from jaxtune.compatibility import private_module
from jaxtune.errors import JaxtuneError, Retry
from jaxtune.strict_json import parse_json

REASON = "JAXTUNE_REASON"  # the variable with the path of a file for the first failure's reason
KEY, SEEN = "jaxtune/failure", "jaxtune/failure_seen"
POLL_SECONDS, GRACE_SECONDS = 1.0, 5.0
# Words in the errors of the CPU, GPU and TPU runtimes when a peer is lost during a collective.
_LOST = ("gloo", "connection", "socket", "unavailable", "heartbeat", "nccl", "peer", "coordination")


class Preempted(Retry):
    """All processes have saved the same step, because the machine is being preempted."""


def fail(code: int, message: str, stacks: bool = False) -> NoReturn:
    """Exits this process at once, and the others when they read its failure.

    Args:
      code: exit code of all processes.
      message: the root cause, in one line.
      stacks: whether every process prints the stacks of its threads.
    """
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr)
    _say(message)
    _note(code, message)
    if _connected():
        me = _state().process_id
        _publish({"process": me, "code": code, "message": message, "stacks": stacks})
    _exit(code)


def distributed() -> Any | None:
    """Returns JAX's private module with the client of the coordinator's key-value store.

    JAX has no public name for the store; Orbax reaches it in the same way. None if JAX no longer
    has it.
    """
    return private_module(
        "jax._src.distributed",
        ("global_state",),
        "a process that fails cannot tell the others why; they end after a missed heartbeat",
    )


def _state() -> Any:
    module = distributed()
    assert module is not None  # `_connected` has checked
    return module.global_state


def _connected() -> bool:
    """Returns whether there are other processes and a store that all of them can read."""
    module = distributed()
    state = None if module is None else module.global_state
    return state is not None and state.client is not None and state.num_processes > 1


def _say(message: str) -> None:
    print("jaxtune: error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _note(code: int, message: str) -> None:
    """Writes exit code and reason for the launcher, unless another process was first.

    SLURM ends a job with the highest exit code of its processes, which is 134 if one of them has
    aborted because it lost the one that failed.
    """
    path = os.environ.get(REASON)
    if path:
        with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
            file.write(f"{code} {' '.join(message.split())}\n")


def _exit(code: int) -> NoReturn:
    # Not with sys.exit: JAX's exit handler would wait for processes that hang.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _publish(failure: dict[str, Any]) -> None:
    client = _state().client
    with contextlib.suppress(Exception):  # another process was first, or the coordinator is gone
        client.key_value_set(KEY, json.dumps(failure))
    _leave_in_order()


def _leave_in_order() -> None:
    """Keeps process 0, which holds the store, alive until all others have read the failure."""
    client = _state().client
    with contextlib.suppress(Exception):
        client.key_value_set(f"{SEEN}/{_state().process_id}", "")
    deadline = time.monotonic() + GRACE_SECONDS
    while _state().process_id == 0 and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if len(client.key_value_dir_get(SEEN)) == _state().num_processes:
                return
        time.sleep(POLL_SECONDS / 5)


def _look() -> dict[str, Any] | None:
    """Returns the published failure, or None."""
    client = _state().client
    try:
        return parse_json(client.key_value_try_get(KEY).encode(), KEY)
    except Exception:  # no failure, the normal case
        return None


def _end_with(failure: dict[str, Any]) -> NoReturn:
    if failure["stacks"]:
        faulthandler.dump_traceback(file=sys.stderr)
    _say(f"process {failure['process']} failed: {failure['message']}")
    _leave_in_order()
    _exit(failure["code"])


def _watch(stopped: threading.Event) -> None:
    me = _state().process_id
    while not stopped.wait(POLL_SECONDS):
        failure = _look()
        if failure is not None and failure["process"] != me:
            _end_with(failure)


@contextlib.contextmanager
def shared(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Shares errors of the block with the other processes, and exits on theirs.

    With one process errors pass unchanged. With several, any error ends all processes, except a
    preemption, which every process raises itself.

    Args:
      explain: returns one line for errors that the user can fix, else None.
    """
    if not _connected():
        yield
        return
    stopped = threading.Event()
    threading.Thread(target=_watch, args=(stopped,), name="failures", daemon=True).start()
    try:
        yield
    except Preempted:
        raise
    except Exception as error:
        _fail_with(error, explain(error))
    finally:
        stopped.set()


def _fail_with(error: Exception, message: str | None) -> NoReturn:
    if message is not None:
        fail(error.exit_code if isinstance(error, JaxtuneError) else 65, message)
    lost = isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in str(error).lower() for word in _LOST
    )
    if not lost:
        traceback.print_exc()
        fail(65, f"{type(error).__name__}: {error}")
    # The lost process may have published its reason: then the watching thread exits this one.
    time.sleep(GRACE_SECONDS)
    fail(75, f"lost another process: {str(error)[:200]}")
