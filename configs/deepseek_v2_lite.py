"""QLoRA on DeepSeek-V2-Lite-Chat, a mixture of 64 experts with latent attention.

  jaxtune train --config configs/deepseek_v2_lite.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_v2_lite

Memory per device, 9.26 GiB of 15.75:

  jaxtune plan --config configs/deepseek_v2_lite.py --topology v5e:1x1

The attention projections are adapted and the experts are frozen in NF4, which is most of the 15.7
billion weights. The names are those of latent attention: k_proj and v_proj do not exist here.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/DeepSeek-V2-Lite-Chat"
    c.data.train = str(DATA / "dialogue.jsonl")
    c.data.chat_template = "deepseek-llm"
    c.adapter.rank = 16
    c.adapter.alpha = 32.0
    c.adapter.targets = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    c.quantize.format = "nf4"
    c.training.batch_size = 16
    c.training.accumulation = 16
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 50
    c.training.epochs = 2
    return c
