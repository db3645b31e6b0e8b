"""Settings that the recipes for the R1 distillations share.

Answers begin with their reasoning, `<think>…</think>`. The chat template of the checkpoints removes
it from the training text, so the built-in one is used. Rows without reasoning would teach the model
to skip it.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the shared settings."""
    c = config.load_file(HERE / "lora.py")
    c.data.chat_template = "deepseek-r1"
    c.data.max_length = 4096
    c.optimizer.learning_rate = 1e-4
    return c
