"""A run that resumes on other devices and with another number of processes."""

import re
import shutil
import signal

import numpy as np
import pytest
from killing import checkpoints, comparable, steps_logged

pytestmark = pytest.mark.slow

STEPS = 12
FLAGS = (
    f"--config.training.steps={STEPS}",
    "--config.training.batch_size=8",
    "--config.checkpoint.every=4",
    "--config.evaluation.every=6",
    "--config.logging.tensorboard=false",
)
# Sums over devices come in another order in float32, and the updates before carry it on.
TOLERANCE = 1e-5
PLACES = {"four devices": (1, 4), "two processes": (2, 1), "one device": (1, 1)}


def start(server, place, *arguments, **options):
    processes, devices = PLACES.get(place, (1, 8))
    environ = {"JAX_NUM_CPU_DEVICES": str(devices)}
    return server.start_all(processes, *arguments, environ=environ, **options)


def finish(processes, code=0):
    for process in processes:
        assert process.wait() == code, "\n".join(each.output() for each in processes)
    return "".join(process.output() for process in processes)


def test_every_array_is_the_same_and_the_data_comes_in_the_same_order(
    server, plain_config, tmp_path
):
    """A run on eight devices is killed, and resumed in three other places."""
    train = ("train", "--config", plain_config, *FLAGS, "--workdir")
    finish(start(server, "one device", *train, tmp_path / "unbroken"))
    unbroken = comparable(tmp_path / "unbroken")
    workdir = tmp_path / "run"
    (process,) = start(server, "eight devices", *train, workdir, "--config.mesh.fsdp=2")
    process.until(lambda: checkpoints(workdir)[0])
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps_logged(workdir) < STEPS
    states = set()
    for place in (*PLACES, "eight devices"):
        copy = shutil.copytree(workdir, tmp_path / place)
        output = finish(start(server, place, "train", "--workdir", copy, fault="hashed_state"), 130)
        states.update(re.findall(r"^state .*", output, re.MULTILINE))
    assert len(states) == 1, states
    for place in PLACES:
        output = finish(start(server, place, "train", "--workdir", tmp_path / place))
        assert "resuming after step" in output
        lines = comparable(tmp_path / place)
        for name in ("step", "tokens", "rows", "batch"):
            assert [line[name] for line in lines] == [line[name] for line in unbroken]
        losses, expected = ([line["loss"] for line in each] for each in (lines, unbroken))
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
