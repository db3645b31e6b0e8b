"""A run whose memory runs out."""

import pytest


@pytest.mark.slow
def test_memory_that_runs_out_in_a_step_ends_a_run_with_65(server, plain_config, tmp_path):
    large = ("--config.training.batch_size=8000", "--config.training.steps=2")
    large += ("--config.training.accumulation=1", "--config.data.packing=false")
    workdir = tmp_path / "run"
    train = ("train", "--config", plain_config, *large, "--workdir", workdir)
    output = server.run(*train, code=65, fault="little_memory")
    last = output.splitlines()[-1]
    assert last.startswith("jaxtune: error: out of memory"), output
    assert "training.accumulation" in last
    assert "Traceback" not in output
