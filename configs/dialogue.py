"""LoRA for conversations of several turns and for following instructions.

  jaxtune train --config configs/dialogue.py --config.data.train=mine.jsonl \
      --workdir runs/dialogue

Memory per device, 15.20 GiB of 15.75:

  jaxtune plan --config configs/dialogue.py --topology v5e:1x1

Every answer of a conversation is a target, the user's turns are not. One or two epochs are enough;
after more the model repeats its training answers.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "dialogue.jsonl")
    c.data.max_length = 2048
    c.adapter.rank = 8
    c.adapter.alpha = 32.0
    c.training.batch_size = 16
    c.training.accumulation = 8
    c.training.remat = "full"  # gradient checkpointing
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 2
    return c
