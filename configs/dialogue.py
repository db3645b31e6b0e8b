"""LoRA for conversations of several turns and for following instructions.

  jaxtune train --config configs/dialogue.py --config.data.train=mine.jsonl \
      --workdir runs/dialogue

Memory per device, 15.20 GiB of 15.75, in micro-batches of two rows:

  jaxtune plan --config configs/dialogue.py --config.training.accumulation=8 \
      --topology v5e:1x1

All answers of a conversation are targets; the user's turns are not. One or two epochs are enough:
with more, the model repeats its training answers.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "dialogue.jsonl")
    c.data.max_length = 2048
    c.adapter.rank = 8
    c.training.remat = "full"  # gradient checkpointing
    return c
