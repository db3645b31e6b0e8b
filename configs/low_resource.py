"""QLoRA, with a 4-bit base and low-rank factors, for one consumer GPU.

  jaxtune train --config configs/low_resource.py --config.data.train=mine.jsonl \
      --workdir runs/low_resource

Memory per device, 5.40 GiB of 15.75, in micro-batches of one row:

  jaxtune plan --config configs/low_resource.py --config.training.accumulation=16 \
      --topology v5e:1x1

The base is frozen in NF4 with double quantization. The 16 rows of a step are split into as many
micro-batches as the memory of the card requires.
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
    c.adapter.rank = 4
    c.adapter.alpha = 8.0
    c.quantize.format = "nf4"
    c.training.remat = "full"
    return c
