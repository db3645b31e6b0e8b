"""LoRA for answers in JSON with fixed keys.

  jaxtune train --config configs/extraction.py --config.data.train=mine.jsonl \
      --workdir runs/extraction

Memory per device, 15.20 GiB of 15.75, in micro-batches of four rows:

  jaxtune plan --config configs/extraction.py --config.training.accumulation=4 \
      --topology v5e:1x1

The instruction names the keys, and the answer is JSON alone. Include rows with empty lists and
nulls: without them, the model invents values. Judge the model by exact matches rather than by its
loss.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "extraction.jsonl")
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    return c
