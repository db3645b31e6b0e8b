import pytest

from jaxtune.errors import JaxtuneError
from jaxtune.parallel.processes import Addresses, find_addresses, reserve_port


def find(coordinator=None, processes=None, process=None, **environ):
    return find_addresses(coordinator, processes, process, environ)


def test_flags_come_before_the_environment():
    environ = {"JAXTUNE_COORDINATOR": "a:1", "JAXTUNE_PROCESSES": "4", "JAXTUNE_PROCESS": "0"}
    assert find() is None
    assert find(**environ) == Addresses("a:1", 4, 0)
    assert find(process=3, **environ) == Addresses("a:1", 4, 3)
    assert find("b:2", 2, 1, **environ) == Addresses("b:2", 2, 1)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"coordinator": "a:1"}, "--processes"),
        ({"processes": 2, "process": 0}, "--coordinator"),
        ({"coordinator": "a:1", "processes": 2, "JAXTUNE_PROCESS": "x"}, "JAXTUNE_PROCESS=x"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "HOST:PORT"),
        ({"coordinator": "a:b", "processes": 2, "process": 0}, "HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process=2 is not within 0 and 1"),
    ],
)
def test_a_bad_address_is_named(flags, message):
    with pytest.raises(JaxtuneError) as error:
        find(**flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reserved_port_is_given_to_nobody_else_and_a_coordinator_can_listen_on_it():
    import socket
    import subprocess
    import sys

    port = reserve_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    program = (
        "import jax; from jaxtune.parallel import processes; processes.initialize(None);"
        "port = processes._held[0].getsockname()[1];"
        "state = jax._src.distributed.global_state;"
        "print(jax.distributed.is_initialized(), state.coordinator_address.endswith(f':{port}'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True\n"
