"""LoRA for a few hundred examples: few parameters, and held back.

  jaxtune train --config configs/small_data.py --config.data.train=mine.jsonl \
      --config.data.eval=held_out.jsonl \
      --workdir runs/small_data

Memory per device, 14.03 GiB of 15.75:

  jaxtune plan --config configs/small_data.py --topology v5e:1x1

A small rank, dropout, weight decay and noise on the embeddings hold it back, and a few input tokens
are replaced in every epoch. Expect the training loss to go to zero all the same: the held-out loss
alone ends the run, and its best adapter is what is exported. data.prompt_templates adds wordings of
your own for the prompts.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(DATA / "small_data.jsonl")
    c.data.eval = str(DATA / "small_data_eval.jsonl")
    c.data.max_length = 512
    c.data.mask_tokens = 0.05
    c.adapter.rank = 4
    c.adapter.alpha = 8.0
    c.adapter.dropout = 0.1
    c.training.batch_size = 8
    c.training.accumulation = 2
    c.training.neftune_alpha = 5.0
    c.optimizer.learning_rate = 1e-4
    c.optimizer.weight_decay = 0.1
    c.optimizer.warmup_steps = 5
    c.training.epochs = 5
    c.evaluation.every = 5
    c.evaluation.batch_size = 4
    c.evaluation.stop_patience = 3
    c.checkpoint.every = 5
    return c
