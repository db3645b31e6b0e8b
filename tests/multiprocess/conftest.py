"""Fixtures that start runs of several processes."""

import pytest
from runs import Running


@pytest.fixture(scope="module")
def start(request):
    """Starts a run of 12 steps in a directory: ``start(processes, workdir, *flags)``.

    The config is `small_config`, or the fixture that a test file names as ``CONFIG``.

    When a process has failed, the others have `grace` seconds before the launcher kills them.
    """
    running, config = [], request.getfixturevalue(getattr(request.module, "CONFIG", "small_config"))

    def begin(processes, workdir, *flags, devices=1, fault="none", grace=60, resume=False):
        fresh = (
            "--config",
            config,
            "--config.training.steps=12",
            "--config.training.batch_size=8",
            "--config.checkpoint.every=4",
            "--config.evaluation.every=6",
            *flags,
        )
        arguments = [*(flags if resume else fresh), "--workdir", str(workdir)]
        running.append(Running(processes, arguments, devices=devices, fault=fault, grace=grace))
        return running[-1]

    yield begin
    for each in running:
        each.stop()
