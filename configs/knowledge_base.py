"""LoRA that answers from a body of documents, and says when they have no answer.

  jaxtune train --config configs/knowledge_base.py --config.data.train=mine.jsonl \
      --workdir runs/knowledge_base

Memory per device, 15.17 GiB of 15.75:

  jaxtune plan --config configs/knowledge_base.py --topology v5e:1x1

Rows are questions and answers under one system turn, each naming its source, some of them with
nothing to find: those teach it to say so. Facts sit in the feed-forward projections, so all
projections are adapted, at a higher rank. Expect it to know what many rows say and to guess at
what one row says.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "knowledge_base.jsonl")
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.adapter.targets = ("all-linear",)
    c.training.batch_size = 16
    c.training.accumulation = 8
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 3
    return c
