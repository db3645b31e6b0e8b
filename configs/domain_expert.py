"""LoRA that makes an expert of one field: medicine, law, finance.

  jaxtune train --config configs/domain_expert.py --config.data.train=mine.jsonl \
      --config.data.eval=held_out.jsonl \
      --workdir runs/domain_expert

Memory per device, 15.45 GiB of 15.75:

  jaxtune plan --config configs/domain_expert.py --topology v5e:1x1

Expect the held-out loss to fall and then to rise: after three evaluations without a lower one the
run stops, and the adapter kept as best is that of the lowest. Facts that the base model has never
seen are better looked up than trained in; what it learns well is the field's way of answering.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "domain_expert.jsonl")
    c.data.eval = str(DATA / "domain_expert_eval.jsonl")
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.adapter.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    c.adapter.dropout = 0.05
    c.training.batch_size = 16
    c.training.accumulation = 4
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 3
    c.evaluation.every = 50
    c.evaluation.batch_size = 4
    c.evaluation.stop_patience = 3
    return c
