"""Loss and gradient do not depend on micro-batches, packing, padding and devices.

Run as a program, this file computes them on eight devices.
"""

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from oracles import LOSS, make_examples, relative
from parts import as_batch
from test_training import keep_gradient

from jaxtune.adapters.projections.lora import Lora
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.checkpoints.load_model import load_model
from jaxtune.config import resolve
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import flatten
from jaxtune.objectives.cross_entropy import LossTerms
from jaxtune.objectives.sft import sft_loss
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import partition_spec
from jaxtune.training.state import initial_state, state_like
from jaxtune.training.step import StepSettings, make_train_step

TERMS = LossTerms(0.1, 1e-3)
LAYOUTS = {
    "padded": {"length": 32, "packing": False},
    "padded more": {"length": 64, "packing": False},
    "packed": {"length": 64, "packing": True},
    "half empty": {"length": 32, "packing": False, "batch_size": 16},
}
# Number of devices, and number of micro-batches of the 8 rows.
SPLITS = ((1, 1), (1, 2), (1, 8), (2, 1), (2, 4), (8, 1))


def compute(directory):
    """Yields name, losses [3] and gradient by path of each combination of split and layout."""
    rows = make_examples(8, longest=32, seed=4)
    for devices in (1, 2, 8):
        mesh = make_mesh(resolve({}).mesh.to_dict(), jax.devices()[:devices])
        parts = load_model(
            open_source(directory), "float32", mesh, method=Lora(4, 8.0), progress=False
        )
        optimizer = keep_gradient()
        like = state_like(parts.definition, optimizer, mesh)
        sharding = NamedSharding(mesh, partition_spec(("batch", "sequence")))
        splits = [count for size, count in SPLITS if size == devices]
        for count, (layout, options) in itertools.product(splits, LAYOUTS.items()):
            step = make_train_step(
                parts.definition,
                partial(sft_loss, terms=TERMS),
                optimizer,
                optax.constant_schedule(1.0),
                ForwardOptions(jnp.float32, "xla", "full"),
                StepSettings(count, 0, False, terms=TERMS),
                like,
            )
            batch = jax.device_put(as_batch(rows, **{"batch_size": 8} | options), sharding)
            with jax.set_mesh(mesh):
                trainable = jax.tree.map(jnp.copy, parts.trainable)
                state = initial_state(trainable, optimizer, like)
                state, metrics = step(state, parts.base, parts.constants, batch)
            losses = np.array([metrics[n] for n in ("loss", "smoothing_loss", "z_loss")])
            name = f"{layout}, {devices} devices, {count} micro-batches"
            yield name, losses, {k: np.asarray(v) for k, v in flatten(state.opt_state)}


@pytest.mark.slow
def test_no_split_changes_loss_or_gradient(tiny, tmp_path):
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, __file__, str(tiny("llama")), str(tmp_path / "all.npz")],
        env=os.environ
        | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        check=True,
    )
    found = dict(np.load(tmp_path / "all.npz"))
    first = f"padded, {SPLITS[0][0]} devices, {SPLITS[0][1]} micro-batches"
    expected = {k.split("|")[1]: v for k, v in found.items() if k.startswith(f"{first}|")}
    moved = {path for path, value in expected.items() if np.any(value)}
    assert len(moved) > 4 and len(found) == len(expected) * len(SPLITS) * len(LAYOUTS)
    for key, value in found.items():
        _, path = key.split("|")
        if path in moved:
            assert relative(value, expected[path]) <= LOSS, key


if __name__ == "__main__":
    arrays = {}
    for name, losses, gradient in compute(Path(sys.argv[1])):
        arrays[f"{name}|losses"] = losses
        arrays |= {f"{name}|{'.'.join(path)}": value for path, value in gradient.items()}
    np.savez(sys.argv[2], **arrays)
