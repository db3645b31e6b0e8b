"""LoRA for a way of writing.

  jaxtune train --config configs/style.py --config.data.train=mine.jsonl \
      --workdir runs/style

Memory per device, 15.22 GiB of 15.75, in micro-batches of eight rows:

  jaxtune plan --config configs/style.py --config.training.accumulation=2 \
      --topology v5e:1x1

Each row pairs a text with the same text in the desired style. The model learns no new facts. Low
ranks are enough; with many epochs, the model copies phrases of the training data.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "style.jsonl")
    c.data.max_length = 512
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.adapter.dropout = 0.05
    return c
