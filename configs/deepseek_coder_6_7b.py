"""LoRA on DeepSeek-Coder-6.7B-Instruct.

  jaxtune train --config configs/deepseek_coder_6_7b.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_coder_6_7b

Memory per device, 15.20 GiB of 15.75:

  jaxtune plan --config configs/deepseek_coder_6_7b.py --topology v5e:1x1

Attention projections alone, rows of 1024 tokens; code.py is the recipe for more.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-coder-6.7b-instruct"
    c.data.train = str(DATA / "code.jsonl")
    c.data.chat_template = "deepseek-coder"
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.training.batch_size = 16
    c.training.accumulation = 4
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 2
    return c
