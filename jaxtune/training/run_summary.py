"""The summary of a prepared run, written before its first step."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.data import Examples
from jaxtune.training.optimizer import count_steps
from jaxtune.training.setup import BATCH_ARRAYS, Setup

BATCHES = 2  # number of hashed batches, enough to distinguish two orders of the data


class SplitSummary(NamedTuple):
    """Examples and their batches; `summarize` consumes the first batches.

    Attributes:
      examples: examples in the order of their files.
      batches: iterator of batches, int32[B, T] arrays by name.
    """

    examples: Examples
    batches: Iterator[Mapping[str, np.ndarray]]


def summarize(setup: Setup, train: SplitSummary, held_out: SplitSummary | None) -> dict[str, Any]:
    """Summarizes a prepared run, so that two runs can be compared.

    Args:
      setup: static half of the run.
      train: training examples and batches.
      held_out: held-out examples and batches, if any.

    Returns:
      JSON values: the model's modules with their parameters and bytes, the method, the mesh, the
      learning rate at a few steps, and the data with a hash of the first batches.
    """
    rows = parameter_summary(setup.definition)
    trained, parameters, _ = trained_share(rows)
    return {
        "model": {
            "model_type": setup.definition.config.get("model_type"),
            "parameters": parameters,
            "trained": trained,
            "bytes": sum(row.bytes for row in rows),
            "modules": [dataclasses.asdict(row) for row in rows],
        },
        "method": f"{setup.method.name}: {setup.method}",
        "mesh": dict(setup.mesh.shape),
        "platform": setup.mesh.devices.flat[0].platform,
        "computation": {
            "dtype": str(setup.options.dtype),
            "attention": setup.options.attention,
            "remat": setup.options.remat,
        },
        "steps": setup.steps,
        "learning_rate": _learning_rates(setup),
        "train": _data(train),
        "eval": _data(held_out) if held_out else None,
    }


def _learning_rates(setup: Setup) -> dict[str, float]:
    """Returns the learning rate of the first, middle and last step and of the end of warm-up."""
    last = max(setup.steps - 1, 0)
    warmup = count_steps(setup.config.optimizer.warmup_steps, setup.steps)
    steps = {0, warmup, last // 2, last}
    return {
        str(step + 1): float(np.asarray(setup.schedule(step)))
        for step in sorted(steps)
        if step <= last
    }


def _data(split: SplitSummary) -> dict[str, Any]:
    examples, first = split.examples, list(itertools.islice(split.batches, BATCHES))
    return {
        "examples": len(examples),
        "tokens": examples.token_count,
        "targets": examples.target_count,
        "dropped": examples.dropped,
        "truncated": examples.truncated,
        "sha256": examples.fingerprint(),
        "batch": list(first[0]["tokens"].shape),
        "first_batches": _hash(first),
    }


def _hash(batches: list[Mapping[str, np.ndarray]]) -> str:
    """Returns the hexadecimal SHA-256 of batches of int[B, T] arrays."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in BATCH_ARRAYS:
            digest.update(np.ascontiguousarray(batch[name], "<i4").tobytes())
    return digest.hexdigest()
