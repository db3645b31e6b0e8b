"""The processes of a run: joining them, and collective operations on the host.

Every process runs the same program on its own devices. `leads` is true for the one that writes
files. Every process must call all other functions, in the same order.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.errors import JaxtuneError, Retry
from jaxtune.parallel import termination
from jaxtune.parallel.failures import distributed

COORDINATOR, PROCESSES, PROCESS = "JAXTUNE_COORDINATOR", "JAXTUNE_PROCESSES", "JAXTUNE_PROCESS"
_TEXT_BYTES = 2000
_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000
_waits = itertools.count()  # numbers the barriers, equally in all processes
_held: list[socket.socket] = []  # ports that this process has reserved
_listens = False  # whether this run looks for notices of preemption
HEARTBEAT_SECONDS, START_SECONDS = 100, 300  # the defaults of JAX


class Addresses(NamedTuple):
    """The coordinator and the numbering of the processes of a run.

    Attributes:
      coordinator: ``host:port`` of process 0.
      processes: number of processes.
      process: index of this process, from 0.
    """

    coordinator: str
    processes: int
    process: int


def find_addresses(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    environ: Mapping[str, str],
) -> Addresses | None:
    """Returns the addresses in flags or else in the environment, or None without any.

    Args:
      coordinator: value of ``--coordinator``, if given.
      processes: value of ``--processes``, if given.
      process: value of ``--process``, if given.
      environ: the environment, with JAXTUNE_COORDINATOR, JAXTUNE_PROCESSES and JAXTUNE_PROCESS.

    Raises:
      JaxtuneError: only some of the three are given, or values are invalid.
    """
    given = {
        COORDINATOR: environ.get(COORDINATOR) if coordinator is None else coordinator,
        PROCESSES: environ.get(PROCESSES) if processes is None else processes,
        PROCESS: environ.get(PROCESS) if process is None else process,
    }
    missing = [name for name, value in given.items() if value in (None, "")]
    if len(missing) == len(given):
        return None
    if missing:
        flag = missing[0].replace("JAXTUNE_", "--").lower()
        raise JaxtuneError(
            f"several processes need --coordinator, --processes and --process; {flag} (or "
            f"{missing[0]}) is missing"
        )
    try:
        found = Addresses(
            str(given[COORDINATOR]), int(given[PROCESSES] or 0), int(given[PROCESS] or 0)
        )
    except ValueError:
        values = f"{PROCESSES}={given[PROCESSES]}, {PROCESS}={given[PROCESS]}"
        raise JaxtuneError(f"{values}: both must be numbers") from None
    host, _, port = found.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise JaxtuneError(f'--coordinator is HOST:PORT of process 0, not "{found.coordinator}"')
    if not 0 <= found.process < found.processes:
        raise JaxtuneError(
            f"--process={found.process} is not within 0 and {found.processes - 1} (--processes="
            f"{found.processes})"
        )
    return found


def initialize(
    addresses: Addresses | None,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    *,
    notices: bool = True,
) -> None:
    """Joins the processes of this run; to be called before any device is used.

    Without addresses, JAX detects those of Cloud TPU, SLURM, Open MPI and Kubernetes; otherwise
    this process is the only one. If the other processes do not join within five minutes, JAX ends
    this one (SIGABRT).

    Args:
      addresses: from `find_addresses`.
      heartbeat_seconds: seconds without a heartbeat before a process counts as dead and the others
        stop.
      notices: whether SIGTERM is caught as a notice of preemption, which the steps of a run look
        for; in the command line from the first step on (see `listen_for_notices`). Without, the
        signal ends the process.

    Raises:
      JaxtuneError: the environment lacks a part of the addresses.
      Retry: the coordinator cannot be started, or rejects this process.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    global _listens
    _listens = notices
    early = notices and not (termination.installed() and _can_listen_later())
    jax.config.update("jax_enable_preemption_service", early)
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "initialization_timeout": START_SECONDS,
        # A finished process waits for the others, whose last evaluation may take a while.
        "shutdown_timeout_seconds": START_SECONDS,
    }
    try:
        if addresses is None and not _initialize_cluster(options):
            addresses = _alone()
        if addresses is not None:
            # A single process listens on the loopback interface, several on all interfaces.
            alone = addresses.coordinator if addresses.processes == 1 else None
            jax.distributed.initialize(
                coordinator_address=addresses.coordinator,
                num_processes=addresses.processes,
                process_id=addresses.process,
                # Do not complete the addresses from a cluster's environment.
                cluster_detection_method="deactivate",
                coordinator_bind_address=alone,
                **options,
            )
    except jax.errors.JaxRuntimeError as error:
        where = "the coordinator" if addresses is None else addresses.coordinator
        reason = str(error).split(":")[0]
        raise Retry(f"could not join the other processes at {where}: {reason}") from error


def _can_listen_later() -> bool:
    """Returns whether this jax has the private method that `listen_for_notices` calls."""
    module = distributed()
    return module is not None and hasattr(module.global_state, "initialize_preemption_sync_manager")


def listen_for_notices() -> bool:
    """Returns whether jax catches SIGTERM as a notice of preemption, which it does from now on.

    Every process calls it after its first step. Earlier, jax would catch the signal, and nothing
    would look for it until loading and compilation are done.
    """
    if not jax.distributed.is_initialized():
        return False
    module = distributed()
    state = None if module is None else module.global_state
    listens = True  # in an unknown version of jax, where `initialize` has enabled the service
    if state is not None and hasattr(state, "preemption_sync_manager"):
        if state.preemption_sync_manager is None and _listens:
            jax.config.update("jax_enable_preemption_service", True)
            state.initialize_preemption_sync_manager()
        listens = state.preemption_sync_manager is not None
    if listens:
        termination.release()
    return listens


def _initialize_cluster(options: Mapping[str, Any]) -> bool:
    """Initializes from a cluster that JAX detects; returns whether there is one."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        # Open MPI from release 5 on no longer sets a variable with the coordinator.
        raise JaxtuneError(
            "Open MPI 5 does not name a coordinator: give --coordinator HOST:PORT, --processes "
            "$OMPI_COMM_WORLD_SIZE and --process $OMPI_COMM_WORLD_RANK"
        )
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise JaxtuneError(
            f"JAX_COORDINATOR_ADDRESS is not enough: give {COORDINATOR}, {PROCESSES} and {PROCESS}"
        )
    try:
        jax.distributed.initialize(**options)
    except ValueError:  # JAX has detected no cluster
        return False
    return True


def _alone() -> Addresses:
    """Returns a loopback address for a single process, without a proxy."""
    os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    jax.config.update("jax_check_proxy_envs", False)
    # Devices of one process need no gloo, which prints its connections to standard output.
    jax.config.update("jax_cpu_collectives_implementation", None)
    return Addresses(f"127.0.0.1:{reserve_port()}", 1, 0)


def reserve_port() -> int:
    """Returns a free port on the loopback interface, which is this process's until it ends.

    A socket stays bound to it, so that the system gives the port to nobody else. It does not
    listen, and SO_REUSEPORT lets the coordinator of the same user do so.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return held.getsockname()[1]


def leads() -> bool:
    """Returns whether this process writes the files and the log of the run."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process has reached the barrier with this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def on_leader(action: Callable[[], Any]) -> None:
    """Runs an action in process 0 while the others wait, for hours if need be.

    Raises:
      JaxtuneError: the action failed, in every process but process 0, which raises its own error.
    """
    failure: BaseException | None = None
    if leads():
        try:
            action()
        except Exception as error:
            failure = error
    if jax.process_count() > 1:
        _wait_for_leader()
        text = "" if failure is None else f"process 0 failed: {failure or type(failure).__name__}"
        told = agree_on_text(text)
        if told and failure is None:
            raise JaxtuneError(told)
    if failure is not None:
        raise failure


def _wait_for_leader() -> None:
    """Waits for every process by the coordinator, because a collective on devices would time out.

    Without the private client of JAX the next collective does the waiting.
    """
    module = distributed()
    client = None if module is None else module.global_state.client
    if client is not None:
        client.wait_at_barrier(f"jaxtune/leader/{next(_waits)}", _WAIT_MILLISECONDS)


def agree(value: int) -> int:
    """Returns the value of process 0, an int32."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def agree_on_text(text: str) -> str:
    """Returns the text of process 0, shortened to 2,000 bytes if there are several processes."""
    if jax.process_count() == 1:
        return text
    content = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = text.encode()[:_TEXT_BYTES]
    content[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    content = np.asarray(multihost_utils.broadcast_one_to_all(content), np.uint8)
    return content.tobytes().rstrip(b"\0").decode(errors="ignore")


def process_index() -> int:
    """Returns the index of this process, from 0."""
    return jax.process_index()


def process_count() -> int:
    """Returns the number of processes."""
    return jax.process_count()


def gather(value: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, of one shape and dtype, as [processes, …]."""
    if jax.process_count() == 1:
        return value[None]
    return np.asarray(multihost_utils.process_allgather(value), value.dtype)


def fetch(tree: Any) -> Any:
    """Returns a pytree of arrays of any shape that this process can read whole."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(_fetch, tree)


def _fetch(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return np.asarray(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def put(value: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Shards an array that every process holds whole: each places its own shards on its devices.

    Args:
      value: NumPy array, or an array of jax, of any shape and dtype.
      sharding: sharding over the devices of all processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
