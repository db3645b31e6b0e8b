"""One process fails: the others learn why, and all end with one exit code.

Without this the others would wait in a collective until the heartbeat is missed, and then abort
without a reason. The first failure is published in the key-value store of jax's coordinator, where
a thread of every process looks for it.
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
from typing import Any, NoReturn

import jax

from jaxtune.errors import JaxtuneError, Retry

try:
    # jax has no public name for the store; orbax reaches it in the same way.
    from jax._src.distributed import global_state
except ImportError:  # then each process fails for itself, and the heartbeat ends the others
    global_state: Any = None

KEY, SEEN = "jaxtune/failure", "jaxtune/failure_seen"
POLL_SECONDS, GRACE_SECONDS = 1.0, 5.0
# What the runtimes of CPUs, GPUs and TPUs say when a peer is gone in the middle of a collective.
_LOST = ("gloo", "connection", "socket", "unavailable", "heartbeat", "nccl", "peer", "coordination")


class Preempted(Retry):
    """All processes have saved the same step, because the machine is about to be taken away."""


def fail(code: int, message: str, stacks: bool = False) -> NoReturn:
    """Ends this process at once, and the others as soon as they hear of it.

    Args:
      code: the exit code of all.
      message: one line, the root cause.
      stacks: dump what every thread of every process is doing.
    """
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr)
    _say(message)
    if _connected():
        me = global_state.process_id
        _publish({"process": me, "code": code, "message": message, "stacks": stacks})
    _exit(code)


def _connected() -> bool:
    """Says whether there are other processes, and a store in which to tell them something."""
    return getattr(global_state, "client", None) is not None and global_state.num_processes > 1


def _say(message: str) -> None:
    print("jaxtune: error:", " ".join(message.split()), file=sys.stderr, flush=True)


def _exit(code: int) -> NoReturn:
    # Not by way of sys.exit: jax would wait there for processes that are stuck.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _publish(failure: dict[str, Any]) -> None:
    client: Any = global_state.client
    with contextlib.suppress(Exception):  # another was first, or the coordinator is gone
        client.key_value_set(KEY, json.dumps(failure))
    _leave_in_order()


def _leave_in_order() -> None:
    """Lets process 0, in which the store is, stay until all others know of the failure."""
    client: Any = global_state.client
    with contextlib.suppress(Exception):
        client.key_value_set(f"{SEEN}/{global_state.process_id}", "")
    deadline = time.monotonic() + GRACE_SECONDS
    while global_state.process_id == 0 and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if len(client.key_value_dir_get(SEEN)) == global_state.num_processes:
                return
        time.sleep(POLL_SECONDS / 5)


def _look() -> dict[str, Any] | None:
    """Returns the failure that was published, if any was."""
    client: Any = global_state.client
    try:
        return json.loads(client.key_value_try_get(KEY))
    except Exception:  # nothing there, which is the rule
        return None


def _end_with(failure: dict[str, Any]) -> NoReturn:
    if failure["stacks"]:
        faulthandler.dump_traceback(file=sys.stderr)
    _say(f"process {failure['process']} failed: {failure['message']}")
    _leave_in_order()
    _exit(failure["code"])


def _watch(stopped: threading.Event) -> None:
    me = global_state.process_id
    while not stopped.wait(POLL_SECONDS):
        failure = _look()
        if failure is not None and failure["process"] != me:
            _end_with(failure)


@contextlib.contextmanager
def shared(explain: Callable[[Exception], str | None]) -> Iterator[None]:
    """Shares what goes wrong in the block with the other processes, and hears what they share.

    With one process errors pass as they are. With several, any error but a preemption, which all
    processes meet together, ends all of them.

    Args:
      explain: gives a line for errors that the user can mend, else None.
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
    # Why it is gone, it may have said; the watching thread then ends this process.
    time.sleep(GRACE_SECONDS)
    fail(75, f"another process is gone: {str(error)[:200]}")
