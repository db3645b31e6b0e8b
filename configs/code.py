"""LoRA for code in the style of your own repositories.

  jaxtune train --config configs/code.py --config.data.train=mine.jsonl \
      --workdir runs/code

Memory per device, 15.09 GiB of 31.25, in micro-batches of one row:

  jaxtune plan --config configs/code.py --config.training.accumulation=16 \
      --topology v6e:1x1

Rows are conversations whose answers are fenced code. Select examples that pass their tests,
because the model learns mistakes as well. The trained model uses the names, libraries and layout
of the training code.
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
    c.data.max_length = 2048
    c.adapter.targets = ("all-linear",)
    c.optimizer.learning_rate = 1e-4
    return c
