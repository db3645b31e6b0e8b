"""Full fine-tuning: every weight is trained.

  jaxtune train --config configs/full.py --config.data.train=mine.jsonl \
      --workdir runs/full

Memory per device, 41.92 GiB of 95.74, in micro-batches of four rows:

  jaxtune plan --config configs/full.py --config.training.accumulation=8 \
      --topology v5p:2x2x1

Float32 weights, gradients and two moments take 16 bytes per weight, 111 GB for this model, split
over all devices. Of all recipes this one fits large data best. It overfits small data, for which
LoRA is the better choice.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "instructions.jsonl")
    c.adapter.method = "full"
    c.training.batch_size = 32
    c.training.epochs = 3
    c.training.remat = "full"
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup_steps = 0.05  # of the run: 100 of 2000 steps
    c.optimizer.weight_decay = 0.01
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.checkpoint.every = 200
    return c
