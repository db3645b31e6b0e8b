"""LoRA for answers in one field, such as medicine, law or finance.

  jaxtune train --config configs/domain_expert.py --config.data.train=mine.jsonl \
      --config.data.eval=held_out.jsonl \
      --workdir runs/domain_expert

Memory per device, 15.45 GiB of 15.75, in micro-batches of four rows:

  jaxtune plan --config configs/domain_expert.py --config.training.accumulation=4 \
      --topology v5e:1x1

The held-out loss falls at first and then rises: the run stops after three evaluations in a row
without improvement, and keeps the adapter with the lowest loss as the best one. Fine-tuning
teaches how the field answers. It is a poor way to add facts that the base model has never seen;
look those up.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "domain_expert.jsonl")
    c.data.eval = str(HERE / "data" / "domain_expert_eval.jsonl")
    c.adapter.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    c.adapter.dropout = 0.05
    c.training.epochs = 3
    c.optimizer.learning_rate = 1e-4
    c.evaluation.every = "0.25 epochs"
    c.evaluation.batch_size = 4
    c.evaluation.stop_patience = 3
    return c
