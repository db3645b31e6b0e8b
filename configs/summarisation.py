"""LoRA for summaries.

  jaxtune train --config configs/summarisation.py --config.data.train=mine.jsonl \
      --workdir runs/summarisation

Memory per device, 15.20 GiB of 15.75:

  jaxtune plan --config configs/summarisation.py --topology v5e:1x1

Rows are prompt and completion: the prompt ends where the summary begins, and only the summary is a
target. Long texts need the room: raise data.max_length to that of the longest. Expect the length
and form of the training summaries.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "summarisation.jsonl")
    c.data.max_length = 2048
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.training.batch_size = 16
    c.training.accumulation = 8
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 30
    c.training.epochs = 2
    return c
