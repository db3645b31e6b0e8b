"""Full fine-tuning: every weight is trained.

  jaxtune train --config configs/full.py --config.data.train=mine.jsonl \
      --workdir runs/full

Memory per device, 41.92 GiB of 95.74:

  jaxtune plan --config configs/full.py --topology v5p:2x2x1

float32 masters, gradients and two moments are 16 bytes a weight, 110 GB for this model, split over
all devices. It fits large data best of all recipes and over-fits small: there LoRA is the better
choice.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "instructions.jsonl")
    c.adapter.method = "full"
    c.training.batch_size = 32  # 4 rows at a time, 8 times
    c.training.accumulation = 8
    c.training.remat = "full"
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup_steps = 100
    c.optimizer.weight_decay = 0.01
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.checkpoint.every = 200
    c.training.epochs = 3
    return c
