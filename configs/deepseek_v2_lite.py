"""QLoRA on DeepSeek-V2-Lite-Chat, a mixture of 64 experts with latent attention.

  jaxtune train --config configs/deepseek_v2_lite.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_v2_lite

Memory per device, 9.22 GiB of 15.75, in micro-batches of one row:

  jaxtune plan --config configs/deepseek_v2_lite.py --config.training.accumulation=16 \
      --topology v5e:1x1

Adapts the attention projections except kv_b_proj, whose edits vLLM cannot load. The experts, which
hold most of the 15.7 billion weights, are frozen in NF4. Latent attention has projections of its
own: there is no k_proj or v_proj.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/DeepSeek-V2-Lite-Chat"
    c.data.train = str(HERE / "data" / "dialogue.jsonl")
    c.data.chat_template = "deepseek-llm"
    c.adapter.targets = ("q_proj", "kv_a_proj_with_mqa", "o_proj")
    c.quantize.format = "nf4"
    return c
