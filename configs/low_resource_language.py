"""LoRA for a language that the base model has seen little of; the sample is Swahili.

  jaxtune train --config configs/low_resource_language.py --config.data.train=mine.jsonl \
      --workdir runs/low_resource_language

Memory per device, 18.82 GiB of 31.25, in micro-batches of two rows:

  jaxtune plan --config configs/low_resource_language.py --config.training.accumulation=8 \
      --topology v6e:1x1

A new language affects all layers, so all projections are adapted, at a high rank with the scale of
rsLoRA. Mix in English or Chinese rows, or the model forgets some of both. It becomes fluent well
before it learns facts.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "low_resource_language.jsonl")
    c.adapter.rank = 32
    c.adapter.rslora = True
    c.adapter.targets = ("all-linear",)
    c.optimizer.learning_rate = 1e-4
    return c
