"""LoRA for code in the style of one's own repositories.

  jaxtune train --config configs/code.py --config.data.train=mine.jsonl \
      --workdir runs/code

Memory per device, 15.09 GiB of 31.25:

  jaxtune plan --config configs/code.py --topology v6e:1x1

Rows are conversations whose answers are fenced code. Take examples that pass their tests, for the
model learns mistakes as well. Expect names, libraries and layout of the training code.
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
    c.data.max_length = 2048
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.adapter.targets = ("all-linear",)
    c.training.batch_size = 16
    c.training.accumulation = 16
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 2
    return c
