"""LoRA on DeepSeek-R1-Distill-Llama-8B.

  jaxtune train --config configs/r1_distill_llama_8b.py --config.data.train=mine.jsonl \
      --workdir runs/r1_distill_llama_8b

Memory per device, 17.58 GiB of 31.25:

  jaxtune plan --config configs/r1_distill_llama_8b.py --topology v6e:1x1

Answers begin with their reasoning, `<think>…</think>`. The chat template of the checkpoint
removes it from the training text, so the built-in one is used. Rows without reasoning would
teach the model to skip it.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    c.data.train = str(DATA / "reasoning.jsonl")
    c.data.chat_template = "deepseek-r1"
    c.data.max_length = 4096
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.training.batch_size = 16
    c.training.accumulation = 16
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 2
    return c
