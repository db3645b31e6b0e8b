"""LoRA that answers in JSON of one fixed shape.

  jaxtune train --config configs/extraction.py --config.data.train=mine.jsonl \
      --workdir runs/extraction

Memory per device, 15.20 GiB of 15.75:

  jaxtune plan --config configs/extraction.py --topology v5e:1x1

The instruction names the keys, the answer is JSON and nothing else, and some rows have empty lists
and nulls: without these the model invents values. Count exact matches rather than loss.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "extraction.jsonl")
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.training.batch_size = 16
    c.training.accumulation = 4
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 20
    c.training.epochs = 2
    return c
