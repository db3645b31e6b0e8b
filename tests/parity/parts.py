"""Combinations of jaxtune's parts that several parity tests use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from oracles import IGNORE, Example

from jaxtune.adapters.method import Method
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.checkpoints.load_model import LoadedModel, load_model
from jaxtune.data.batches import Batch, eval_batches
from jaxtune.data.examples import Examples
from jaxtune.parallel.mesh import single_device_mesh


def load_parts(directory: Path, method: Method) -> LoadedModel:
    """Loads a checkpoint in float32 with a method attached."""
    return load_model(
        open_source(directory), "float32", single_device_mesh(), method=method, progress=False
    )


def as_batch(
    rows: Sequence[Example], batch_size: int, length: int, *, packing: bool, reserved: int = 0
) -> Batch:
    """Returns all rows as a batch of the loader, with arrays int32[batch_size, length]."""
    tokens = [np.asarray(row.input_ids, np.int32) for row in rows]
    targets = [np.asarray([*row.labels[1:], IGNORE], np.int32) for row in rows]
    examples = Examples(tokens, targets, [f"rows:{i}" for i in range(len(rows))])
    (batch,) = eval_batches(
        examples, batch_size=batch_size, length=length, packing=packing, reserved=reserved
    )
    return batch


_ON_EIGHT_DEVICES = """
import json, sys
import jax, jaxtune
assert jax.device_count() == 8
for directory, config in json.loads(sys.argv[1]).items():
    jaxtune.train(config, directory)
"""


def train_on_eight_devices(runs: Mapping[Path, Mapping[str, Any]]) -> None:
    """Trains the config of each directory, one after the other, in a process with eight devices."""
    configs = json.dumps({str(directory): config for directory, config in runs.items()})
    subprocess.run(
        [sys.executable, "-c", _ON_EIGHT_DEVICES, configs],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        check=True,
    )
