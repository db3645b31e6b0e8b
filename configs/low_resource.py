"""QLoRA: a 4-bit base and small factors, for one consumer GPU.

  jaxtune train --config configs/low_resource.py --config.data.train=mine.jsonl \
      --workdir runs/low_resource

Memory per device, 5.40 GiB of 15.75:

  jaxtune plan --config configs/low_resource.py --topology v5e:1x1

The base is kept in NF4 with double quantization; rows go through one by one, and 16 of them make
an update.
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
    c.adapter.rank = 4
    c.adapter.alpha = 8.0
    c.quantize.format = "nf4"
    c.training.batch_size = 16
    c.training.accumulation = 16
    c.training.remat = "full"
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 30
    c.training.epochs = 2
    return c
