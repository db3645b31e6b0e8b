"""A run that is killed, lengthened and killed again equals one of its final length."""

import signal
import time

import pytest

from jaxtune.api.run import Run
from jaxtune.api.train import train
from jaxtune.cli import main
from jaxtune.config import load_file, resolve

FLAGS = ["optimizer.schedule=constant", "adapter.dropout=0.1", "checkpoint.every=5"]
FLAGS += ["evaluation.every=5", "logging.tensorboard=false"]


@pytest.mark.slow
def test_kills_before_and_after_a_run_is_lengthened_change_nothing(
    plain_config, jaxtune_command, tmp_path, paused
):
    whole = train(resolve(load_file(plain_config), [*FLAGS, "training.steps=24"]), tmp_path / "all")
    workdir = tmp_path / "run"
    flags = [f"--config.{flag}" for flag in FLAGS]

    def kill(steps, *arguments):
        process = jaxtune_command("train", "--workdir", workdir, *arguments, steps=steps)
        while not paused.exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()

    kill(7, "--config", plain_config, *flags, "--config.training.steps=12")
    main(["train", "--workdir", str(workdir)])
    assert Run(workdir).directory.steps_done() == 12
    # Once before and once after the first checkpoint of the new length.
    kill(2, "--config.training.steps=24")
    kill(6)
    main(["train", "--workdir", str(workdir)])
    run = Run(workdir)
    clocked = {"tokens_per_second", "data_wait"}
    ours, theirs = (
        [{k: v for k, v in line.items() if k not in clocked} for line in each.metrics()]
        for each in (run, whole)
    )
    assert ours == theirs and len(ours) == 24
    files = [each.adapter_directory("last") / "adapter_model.safetensors" for each in (run, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    # The end of the first length is evaluated as well.
    assert [line["step"] for line in run.evaluations()] == [5, 10, 12, 15, 20, 24]
    assert {line["step"]: line["loss"] for line in whole.evaluations()}.items() <= {
        line["step"]: line["loss"] for line in run.evaluations()
    }.items()
