"""LoRA on DeepSeek-LLM-7B-Chat, as a starting point.

  jaxtune train --config configs/deepseek_llm_7b.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_llm_7b

Memory per device, 15.43 GiB of 15.75, in micro-batches of four rows:

  jaxtune plan --config configs/deepseek_llm_7b.py --config.training.accumulation=4 \
      --topology v5e:1x1

Uses the settings that the LoRA recipes share: rank 16 on the attention projections.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "instructions.jsonl")
    return c
