"""The processes of a run: how they find one another, and what they do together.

Every process runs the same program on its own devices. `leads` says which of them writes files;
all others of these functions have to be called by every process, in the same order.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtune.errors import JaxtuneError, Retry

COORDINATOR, PROCESSES, PROCESS = "JAXTUNE_COORDINATOR", "JAXTUNE_PROCESSES", "JAXTUNE_PROCESS"
HEARTBEAT_SECONDS, START_SECONDS = 100, 300  # jax's own


class Addresses(NamedTuple):
    """Where the processes of a run meet.

    Attributes:
      coordinator: ``host:port`` of process 0.
      processes: how many there are.
      process: which one this is, from 0.
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
    """Returns the addresses that flags or the environment give, flags first; None: neither does.

    Args:
      coordinator: of the flag ``--coordinator``, if given.
      processes: of the flag ``--processes``, if given.
      process: of the flag ``--process``, if given.
      environ: the environment, of which JAXTUNE_COORDINATOR and its like are read.

    Raises:
      JaxtuneError: some of the three without the others, or values that are no addresses.
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
        raise JaxtuneError(f"{values}: these are numbers") from None
    host, _, port = found.coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise JaxtuneError(f'--coordinator is HOST:PORT of process 0, not "{found.coordinator}"')
    if not 0 <= found.process < found.processes:
        raise JaxtuneError(
            f"--process={found.process} is not one of {found.processes} processes, which count "
            "from 0"
        )
    return found


def initialize(addresses: Addresses | None, heartbeat_seconds: int = HEARTBEAT_SECONDS) -> None:
    """Joins the processes of this run, before anything else makes use of a device.

    Without addresses jax looks for those of Cloud TPU, SLURM, Open MPI and Kubernetes; where it
    finds none, this process is the only one. Where the others are not there within five minutes,
    jax ends this process (SIGABRT).

    Args:
      addresses: as given, if any.
      heartbeat_seconds: after so much silence a process counts as dead, and the others stop.

    Raises:
      JaxtuneError: an environment that says too little.
      Retry: the coordinator cannot be started, or turns this process away.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    options: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_seconds,
        "initialization_timeout": START_SECONDS,
        # Who has finished waits for the others, whose last evaluation may take a while.
        "shutdown_timeout_seconds": START_SECONDS,
    }
    try:
        if addresses is None:
            addresses = _detect(options)
        if addresses is not None:
            # A single process listens to itself; several do on every interface.
            alone = addresses.coordinator if addresses.processes == 1 else None
            jax.distributed.initialize(
                coordinator_address=addresses.coordinator,
                num_processes=addresses.processes,
                process_id=addresses.process,
                # What is given is not completed from a cluster's environment.
                cluster_detection_method="deactivate",
                coordinator_bind_address=alone,
                **options,
            )
    except jax.errors.JaxRuntimeError as error:
        where = "the coordinator" if addresses is None else addresses.coordinator
        reason = str(error).split(":")[0]
        raise Retry(f"could not join the other processes at {where}: {reason}") from error


def _detect(options: Mapping[str, Any]) -> Addresses | None:
    """Joins the processes that jax finds; returns where to wait for nobody if it finds none."""
    if "OMPI_COMM_WORLD_SIZE" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ:
        # From its release 5 on Open MPI no longer says where its processes may meet.
        raise JaxtuneError(
            "Open MPI 5 names no coordinator: give --coordinator HOST:PORT, --processes "
            "$OMPI_COMM_WORLD_SIZE and --process $OMPI_COMM_WORLD_RANK"
        )
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        raise JaxtuneError(
            f"JAX_COORDINATOR_ADDRESS is not enough: give {COORDINATOR}, {PROCESSES} and {PROCESS}"
        )
    try:
        jax.distributed.initialize(**options)
    except ValueError:  # it lacks an address: no cluster that it knows
        return _alone()
    return None


def _alone() -> Addresses:
    """Returns an address of this machine alone, which no proxy is asked about."""
    os.environ.setdefault("no_grpc_proxy", "127.0.0.1")
    jax.config.update("jax_check_proxy_envs", False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Addresses(f"127.0.0.1:{free.getsockname()[1]}", 1, 0)


def leads() -> bool:
    """Says whether this is the process that writes the run's files and log."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; `name` tells the places apart."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: int) -> int:
    """Returns the value that process 0 has, an int32."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def fetch(tree: Any) -> Any:
    """Returns a pytree whose arrays this process can read whole, wherever their parts lie."""
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
    """Places an array that every process has whole: each one takes its own shards to its devices.

    Args:
      value: NumPy array, or an array of jax, of any shape and dtype.
      sharding: over the devices of all processes.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
