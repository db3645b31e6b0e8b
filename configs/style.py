"""LoRA that teaches a way of writing.

  jaxtune train --config configs/style.py --config.data.train=mine.jsonl \
      --workdir runs/style

Memory per device, 15.22 GiB of 15.75:

  jaxtune plan --config configs/style.py --topology v5e:1x1

Rows are pairs of a text and the same text in the style wanted. Expect no new knowledge. Low ranks
are enough, and many epochs copy phrases.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "style.jsonl")
    c.data.max_length = 512
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.adapter.dropout = 0.05
    c.training.batch_size = 16
    c.training.accumulation = 2
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 10
    c.training.epochs = 2
    return c
