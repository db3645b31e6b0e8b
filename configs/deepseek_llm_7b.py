"""LoRA on DeepSeek-LLM-7B-Chat: where to start.

  jaxtune train --config configs/deepseek_llm_7b.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_llm_7b

Memory per device, 15.43 GiB of 15.75:

  jaxtune plan --config configs/deepseek_llm_7b.py --topology v5e:1x1

The engine's defaults: rank 16 on the attention projections.
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
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.training.batch_size = 16
    c.training.accumulation = 4
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 2
    return c
