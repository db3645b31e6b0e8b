"""Requests that certainly do not fit are refused with one line before anything is allocated."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jaxtune.adapters import method_from_config
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.memory import GIB, check_fits, group_bytes, host_bytes
from jaxtune.training.setup import check_memory, set_up

TOO_LARGE = {
    "adapter.rank=100000000": "adapter.rank=100000000: the trained arrays, their gradient",
    "training.batch_size=2000000000": "training.batch_size=2000000000, data.max_length=64: a batch",
    "data.max_length=2000000000": "training.batch_size=8, data.max_length=2000000000: a batch",
    "evaluation.batch_size=2000000000": "evaluation.batch_size=2000000000, data.max_length=64",
}


@pytest.mark.parametrize("override", TOO_LARGE)
def test_the_option_and_the_bytes_are_named(tiny, override):
    model = tiny("llama")
    sections = {"model": {"path": str(model)}, "data": {"max_length": 64, "eval": "x"}}
    real = json.loads((model / "config.json").read_text())

    def prepared(config):
        return set_up(config, real, method_from_config(config.adapter), jax.devices()[:1])

    setup = prepared(resolve(sections, [override]))
    with pytest.raises(JaxtuneError) as error:
        check_memory(setup)
    assert str(error.value).startswith(TOO_LARGE[override])
    assert " GiB, and this machine has " in str(error.value)
    check_memory(prepared(resolve(sections)))


def test_a_batch_that_fits_without_its_hidden_states_is_refused(tiny):
    model = tiny("llama")
    sections = {"model": {"path": str(model)}, "training": {"accumulation": 1}}
    real = json.loads((model / "config.json").read_text())
    # 16 bytes of a token in the batch, and 4 bytes of each number in its hidden state.
    length = host_bytes() // (8 * 4 * min(real["hidden_size"], 64))
    config = resolve(sections, [f"data.max_length={length}", "training.dtype=float32"])
    setup = set_up(config, real, method_from_config(config.adapter), jax.devices()[:1])
    with pytest.raises(JaxtuneError, match=rf"data.max_length={length}: the hidden states"):
        check_memory(setup)


def test_devices_of_a_cpu_share_the_memory_of_the_host():
    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("data",), devices=jax.devices())
    check_fits("few", mesh, host_bytes() // count)
    with pytest.raises(JaxtuneError, match=r"many: .* and this machine has"):
        check_fits("many", mesh, host_bytes() // count + GIB)


def test_the_limit_of_the_process_counts():
    program = "from jaxtune.parallel.memory import host_bytes; print(host_bytes())"
    command = f"ulimit -v {8 * 2**20} && exec {sys.executable} -c '{program}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert int(done.stdout) == min(8 * GIB, host_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("override", [*TOO_LARGE][::3])  # an adapter, a batch
def test_the_command_ends_with_65(small_config, tmp_path, override):
    command = [sys.executable, "-m", "jaxtune.cli", "train", "--config", str(small_config)]
    command += ["--workdir", str(tmp_path / "run"), f"--config.{override}"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 12000000 && exec "$@"', "bash", *command],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 65, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("jaxtune: error: ") and "this machine has 11.44 GiB" in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


GROUPS = {
    "version 2": ("0::/slice/job/step", "slice/job", "memory.max", "memory.swap.max"),
    "a container": ("0::/", "", "memory.max", "memory.swap.max"),
    "another name space": ("0::/../../x", "", "memory.max", "memory.swap.max"),
    "version 1": (
        "11:cpuset:/\n5:memory:/slurm/uid_1/job",
        "memory/slurm/uid_1",
        "memory.limit_in_bytes",
        "memory.memsw.limit_in_bytes",
    ),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_limits_of_the_control_groups_and_their_ancestors_count(kind, tmp_path):
    """The files have the names and contents of the kernel's documentation."""
    lines, limited, memory, swap = GROUPS[kind]
    own, group = tmp_path / "own", tmp_path / "groups" / limited
    group.mkdir(parents=True)
    own.write_text(lines + "\n")

    def found():
        return group_bytes(100 * GIB, 10 * GIB, tmp_path / "groups", own)

    assert found() == []
    for unlimited in ("max", str(2**63 - 4096)):
        (group / memory).write_text(unlimited)
        assert found() == []
    (group / memory).write_text(f"{8 * GIB}\n")
    assert found() == [18 * GIB]  # with the swap space of the machine
    (group / swap).write_text("max" if swap == "memory.swap.max" else str(2**63 - 4096))
    assert found() == [18 * GIB]
    (group / swap).write_text(str(GIB if swap == "memory.swap.max" else 9 * GIB))
    assert found() == [9 * GIB]
    other = tmp_path / "groups" / "another"
    other.mkdir()
    (other / memory).write_text("4096")
    assert found() == [9 * GIB]
    assert group_bytes(100 * GIB, 0, tmp_path / "none", tmp_path / "none") == []
