"""How tests start runs of several processes."""

import pytest
from runs import Running


@pytest.fixture(scope="module")
def start(small_config, tmp_path_factory):
    """Starts a run of 12 steps in a directory: ``start(processes, workdir, *flags)``."""
    cache = tmp_path_factory.getbasetemp() / "xla"
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
        running.append(Running(processes, arguments, devices=devices, fault=fault, cache=cache))
        return running[-1]

    yield begin
    for each in running:
        each.stop()
