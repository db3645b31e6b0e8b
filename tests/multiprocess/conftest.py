"""Fixtures that start runs of several processes."""

import pytest
from runs import Running


@pytest.fixture(scope="module")
def start(small_config):
    """Starts a run of 12 steps in a directory: ``start(processes, workdir, *flags)``."""
    running = []

    def begin(processes, workdir, *flags, devices=1, fault="none", resume=False):
        fresh = (
            "--config",
            small_config,
            "--config.training.steps=12",
            "--config.training.batch_size=8",
            "--config.checkpoint.every=4",
            "--config.evaluation.every=6",
            *flags,
        )
        arguments = [*(() if resume else fresh), "--workdir", str(workdir)]
        running.append(Running(processes, arguments, devices=devices, fault=fault))
        return running[-1]

    yield begin
    for each in running:
        each.stop()
