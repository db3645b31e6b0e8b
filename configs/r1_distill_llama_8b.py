"""LoRA on DeepSeek-R1-Distill-Llama-8B.

  jaxtune train --config configs/r1_distill_llama_8b.py --config.data.train=mine.jsonl \
      --workdir runs/r1_distill_llama_8b

Memory per device, 17.58 GiB of 31.25, in micro-batches of one row:

  jaxtune plan --config configs/r1_distill_llama_8b.py --config.training.accumulation=16 \
      --topology v6e:1x1

Answers begin with their reasoning: see bases/reasoning.py.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "reasoning.py")
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    c.data.train = str(HERE / "data" / "reasoning.jsonl")
    return c
