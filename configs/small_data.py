"""LoRA for a few hundred examples: few parameters, strongly regularized.

  jaxtune train --config configs/small_data.py --config.data.train=mine.jsonl \
      --config.data.eval=held_out.jsonl \
      --workdir runs/small_data

Memory per device, 14.03 GiB of 15.75, in micro-batches of four rows:

  jaxtune plan --config configs/small_data.py --config.training.accumulation=2 \
      --topology v5e:1x1

A small rank, dropout, weight decay, noise on the embeddings and random replacements of a few input
tokens regularize the model. Its training loss still goes to zero, so the held-out loss decides when
the run stops, and the best adapter is the one to export. data.prompt_templates adds your own
wordings of the prompts.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/deepseek-llm-7b-chat"
    c.data.train = str(HERE / "data" / "small_data.jsonl")
    c.data.eval = str(HERE / "data" / "small_data_eval.jsonl")
    c.data.max_length = 512
    c.data.mask_tokens = 0.05
    c.adapter.rank = 4
    c.adapter.alpha = 8.0
    c.adapter.dropout = 0.1
    c.training.batch_size = 8
    c.training.epochs = 5
    c.training.neftune_alpha = 5.0
    c.optimizer.learning_rate = 1e-4
    c.optimizer.weight_decay = 0.1
    c.evaluation.every = "0.25 epochs"
    c.evaluation.batch_size = 4
    c.evaluation.stop_patience = 3
    c.checkpoint.every = "0.25 epochs"
    return c
