"""Scores of the base model's experts on the training data, from which ESFT selects experts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.adapters.define import define
from jaxtune.adapters.esft.expert_scores import ExpertScores
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.source import TensorSource
from jaxtune.config import AdapterConfig, Config
from jaxtune.data import Examples, eval_batches
from jaxtune.errors import JaxtuneError
from jaxtune.layers.attention import choose_backend
from jaxtune.layers.cpu_bfloat16 import jit
from jaxtune.layers.decoder import ForwardOptions
from jaxtune.layers.tree import Tree
from jaxtune.models.definition import Definition
from jaxtune.parallel.devices import DeviceGroup
from jaxtune.parallel.mesh import make_mesh, named_sharding
from jaxtune.parallel.processes import fetch, put
from jaxtune.training.placement.fit import fit_to_devices, split_of, with_accumulation
from jaxtune.training.placement.memory import bytes_per_device

logger = logging.getLogger(__name__)


class _Sums(NamedTuple):
    """Sums over tokens.

    Attributes:
      tokens: scalar, number of tokens.
      load: [layers, E], number of tokens routed to each expert.
      gates: [layers, E], sum of the gate weights of each expert.
    """

    tokens: Any
    load: Any
    gates: Any


def score_experts(config: Config, source: TensorSource, examples: Examples) -> ExpertScores:
    """Scores every routed expert of the base model on a sample of the training data.

    Args:
      config: resolved config; sample size, batch size, mesh, dtypes and quantization are used.
      source: checkpoint of the base model.
      examples: training examples.

    Returns:
      Two scores of each expert by layer: the share of the choices in its layer, and the mean gate
      weight over all tokens.

    Raises:
      JaxtuneError: the model has no routed experts.
    """
    sample = take_sample(examples, config.adapter.expert_sample, config.training.seed)
    logger.info("scoring experts on %d of %d examples", len(sample), len(examples))
    quantization = huggingface.choose_quantization(config.quantize, source.config)
    definition = define(source.config, config.training.dtype, quantization=quantization)
    devices = DeviceGroup.of(jax.devices())
    config, _ = fit_to_devices(config, definition, devices)
    mesh, training = make_mesh(config.mesh.to_dict()), config.training
    backend = choose_backend(config.model.attention, devices.platform, False)
    options = ForwardOptions(jnp.dtype(training.dtype), backend, "none", devices.platform)
    resident = bytes_per_device(definition.abstract("base", mesh))
    config = with_accumulation(config, definition, options, devices, mesh, resident, trainable=0)
    parts = load_model(source, training.dtype, mesh, quantization=quantization)
    layers = parts.definition.mixture_layers
    if not layers:
        raise JaxtuneError(
            f"adapter.method=esft trains routed experts, and {source.config.get('model_type')} "
            "has none"
        )
    step = _make_step(parts.definition, options)
    total = _Sums(0.0, 0.0, 0.0)
    rows = eval_batches(
        sample,
        batch_size=split_of(config).micro_rows,
        length=config.data.max_length,
        packing=config.data.packing,
    )
    with jax.set_mesh(mesh):
        for row in rows:
            shardings = {
                name: named_sharding(mesh, ("batch", "sequence"), value.shape)
                for name, value in row.items()
            }
            batch = {name: put(value, shardings[name]) for name, value in row.items()}
            sums = jax.tree.map(np.float64, jax.device_get(fetch(step(parts.base, batch))))
            total = _Sums(*(a + b for a, b in zip(total, sums, strict=True)))
    chosen = total.load.sum(axis=1, keepdims=True)
    tables = (total.load / chosen, total.gates / total.tokens)
    return ExpertScores(*(dict(zip(layers, table.tolist(), strict=True)) for table in tables))


def take_sample(examples: Examples, tokens: int, seed: int) -> Examples:
    """Draws random examples until they have at least `tokens` tokens, or all are drawn."""
    order = np.random.default_rng(seed).permutation(len(examples))
    sizes = np.cumsum(examples.lengths[order])
    kept = sorted(order[: int(np.searchsorted(sizes, tokens)) + 1].tolist())
    return examples.select(kept)


def summarize(scores: ExpertScores, section: AdapterConfig) -> str:
    """Returns text: the experts of each layer that an ``adapter`` section selects."""
    kind, threshold = section.expert_score, section.expert_threshold
    lines = [f"experts of each layer whose {kind} scores sum to {threshold:g}:"]
    for layer, experts in scores.choose(kind, threshold):
        every = len(scores.token[layer])
        lines.append(
            f"layer {layer:<4}{len(experts):>4} of {every}: {', '.join(map(str, experts))}"
        )
    return "\n".join(lines)


def _make_step(definition: Definition, options: ForwardOptions) -> Any:
    """Builds the jitted ``(base, batch) → _Sums``."""

    @jit
    def step(base: Tree, batch: Mapping[str, jax.Array]) -> _Sums:
        model, segments = definition.bind(base), batch["segment_ids"]
        _, _, routing = model.decoder(batch["tokens"], segments, batch["positions"], options)
        assert routing is not None  # the definition has routed experts
        return _Sums(jnp.sum(segments != 0), routing.load, routing.gates)

    return step
