"""`jaxtune plan` accepts and refuses the same settings as `jaxtune train`, with the same words.

Run as a program, this file tries the combinations on some of the devices that there are.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BATCHES = (8, 6, 1)
ACCUMULATIONS = (None, 0, 1, 2, 3)  # None: not set
MESHES = (
    "",
    "mesh.fsdp=4",
    "mesh.fsdp=-1",
    "mesh.tensor=2",
    "mesh.data=2 mesh.fsdp=2",
    "mesh.data=1",
    "mesh.sequence=2",
    "mesh.sequence=3",
)
DEVICES = (1, 2, 4, 6, 8)
LENGTH = 8


def combinations():
    """Returns 40 combinations at random."""
    every = list(itertools.product(BATCHES, ACCUMULATIONS, MESHES, DEVICES))
    chosen = np.random.default_rng(1).choice(len(every), 40, replace=False)
    return [every[index] for index in sorted(chosen)]


def overrides(batch, accumulation, mesh):
    """Returns the options of a combination, as on the command line."""
    split = [] if accumulation is None else [f"training.accumulation={accumulation}"]
    return [f"training.batch_size={batch}", *split, *mesh.split()]


def verdict(attempt, *arguments):
    """Returns "" for settings that are accepted, else the error."""
    from jaxtune.errors import JaxtuneError

    try:
        attempt(*arguments)
    except JaxtuneError as error:
        return str(error)
    return ""


def try_all(model):
    """Returns the verdicts of training, of the compiled plan and of the estimated one."""
    import jax
    import jax.numpy as jnp

    from jaxtune.config import resolve
    from jaxtune.planning.plan import model_config, plan_for
    from jaxtune.planning.topology import Topology
    from jaxtune.training.setup import set_up
    from jaxtune.training.train import choose_method

    sections = {"model": {"path": model}, "data": {"max_length": LENGTH}}

    def train(options, count):
        config = resolve(sections, options)
        method, _ = choose_method(config.adapter)
        setup = set_up(config, model_config(config.model), method, jax.devices()[:count])
        rows = jnp.zeros((config.training.batch_size, LENGTH), jnp.int32)
        setup.put_batch(dict.fromkeys(setup.batch_like(), rows))

    def compiled(options, count):
        hardware = Topology("cpu", jax.devices()[:count], count, 2**30)
        plan_for(resolve(sections, options), hardware)

    def estimated(options, count):
        plan_for(resolve(sections, options), Topology(f"h100:{count}", None, count, 2**30))

    return [
        [verdict(attempt, overrides(*rest), count) for attempt in (train, compiled, estimated)]
        for *rest, count in combinations()
    ]


@pytest.mark.slow
def test_plan_refuses_what_train_refuses(tiny, tmp_path):
    model = tiny("llama", num_hidden_layers=1)
    done = subprocess.run(
        [sys.executable, __file__, str(model), str(tmp_path / "verdicts.json")],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(max(DEVICES)),
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    chosen = combinations()
    tried = [set(values) for values in zip(*chosen, strict=True)]
    assert tried == [set(BATCHES), set(ACCUMULATIONS), set(MESHES), set(DEVICES)]
    refused = 0
    for combination, (train, compiled, estimated) in zip(chosen, verdicts, strict=True):
        assert compiled == train and estimated == train, combination
        refused += bool(train)
        batch, accumulation, mesh, _ = combination
        # Only what is set explicitly is refused, with the nearest values that work.
        assert not train or ((accumulation or mesh) and "nearest" in train), combination
        if not mesh and not (accumulation and batch % accumulation):
            assert not train, combination
    assert 8 <= refused <= 32


def test_an_estimate_refuses_what_training_refuses(tiny):
    from jaxtune.config import resolve
    from jaxtune.errors import JaxtuneError
    from jaxtune.planning import plan

    sections = {"model": {"path": str(tiny("llama"))}, "data": {"max_length": 8}}
    with pytest.raises(JaxtuneError, match=r"mesh.fsdp=3 cannot be used .* can: mesh.fsdp=4"):
        plan(resolve(sections, ["mesh.fsdp=3"]), "mi300x:8")
    idle = plan(resolve(sections, ["training.batch_size=4"]), "mi300x:8")
    assert any("training.batch_size=8 has none" in note for note in idle.notes)
    assert idle.flops.tokens == 8 * 8, "empty rows are computed as well"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(try_all(sys.argv[1])))
