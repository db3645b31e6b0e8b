"""Parts of sharded arrays in host memory, on eight devices; this file is also the program."""

import os
import subprocess
import sys

import numpy as np
import pytest

from jaxtune.errors import JaxtuneError
from jaxtune.parallel.host import read_part
from jaxtune.parallel.processes import on_leader


def test_an_error_of_the_only_process_is_its_own():
    done = []
    on_leader(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(JaxtuneError, match=r"^the disk is full$"):
        on_leader(lambda: fail("the disk is full"))


def fail(message):
    raise JaxtuneError(message)


def test_entries_of_a_stack_are_read_from_any_sharding():
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "54 entries\n"


def check():
    import jax
    import ml_dtypes
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
    count = 0
    for dtype in (np.float32, ml_dtypes.bfloat16, np.uint8):
        stack = np.arange(2 * 4 * 6 * 8).reshape(2, 4, 6, 8).astype(dtype)
        specs = (P(), P("a", "b", "c"), P(None, ("a", "b"), None, "c"), P(None, None, "a"))
        arrays = [jax.device_put(stack, jax.sharding.NamedSharding(mesh, spec)) for spec in specs]
        for array in (*arrays, jax.device_put(stack), stack):
            for place in ((), (1,), (1, 2)):
                count += 1
                found = read_part(array, place)
                assert found.dtype == stack.dtype and np.array_equal(found, stack[place])
    print(f"{count} entries")


if __name__ == "__main__":
    check()
