"""LoRA that answers from a body of documents, or says that they have no answer.

  jaxtune train --config configs/knowledge_base.py --config.data.train=mine.jsonl \
      --workdir runs/knowledge_base

Memory per device, 15.17 GiB of 15.75, in micro-batches of two rows:

  jaxtune plan --config configs/knowledge_base.py --config.training.accumulation=8 \
      --topology v5e:1x1

Rows are questions and answers under the same system turn. Each answer names its source; rows whose
answer is not in the documents teach the model to say so. All projections are adapted, because
facts are stored in the feed-forward ones. The model learns facts that occur in many rows, and
guesses those that occur in one.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "knowledge_base.jsonl")
    c.adapter.targets = ("all-linear",)
    c.training.epochs = 3
    c.optimizer.learning_rate = 1e-4
    return c
