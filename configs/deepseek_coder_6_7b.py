"""LoRA on DeepSeek-Coder-6.7B-Instruct.

  jaxtune train --config configs/deepseek_coder_6_7b.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_coder_6_7b

Memory per device, 15.20 GiB of 15.75, in micro-batches of four rows:

  jaxtune plan --config configs/deepseek_coder_6_7b.py --config.training.accumulation=4 \
      --topology v5e:1x1

Trains the attention projections on rows of 1024 tokens, which fits a device of 16 GiB. code.py
trains all projections on longer rows.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-coder-6.7b-instruct"
    c.data.train = str(HERE / "data" / "code.jsonl")
    c.data.chat_template = "deepseek-coder"
    return c
