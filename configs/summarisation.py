"""LoRA for summaries.

  jaxtune train --config configs/summarisation.py --config.data.train=mine.jsonl \
      --workdir runs/summarisation

Memory per device, 15.20 GiB of 15.75, in micro-batches of two rows:

  jaxtune plan --config configs/summarisation.py --config.training.accumulation=8 \
      --topology v5e:1x1

Rows have a prompt and a completion. The prompt ends where the summary begins, and only the summary
is a target. For longer texts, raise data.max_length to the length of the longest. The model adopts
the length and form of the training summaries.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "summarisation.jsonl")
    c.data.max_length = 2048
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    return c
