"""LoRA on DeepSeek-V3, 671 billion weights in the fp8 that they are published in.

  jaxtune train --config configs/deepseek_v3.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_v3

Memory per device:

  jaxtune plan --config configs/deepseek_v3.py --topology v5p:4x4x4

The fp8 blocks of the checkpoint are kept bit for bit, and split over the devices: experts along
mesh.expert, the hidden dimension along mesh.fsdp, and the batch along both, a row for each device.
The attention projections are adapted. For 512 chips (v5p:8x8x8) take mesh.fsdp=64 and 512 rows;
quantize.format=int4 halves the weights: docs/scaling.md.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

DATA = Path(__file__).resolve().parent / "data"


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.default()
    c.model.path = "deepseek-ai/DeepSeek-V3"
    c.data.train = str(DATA / "dialogue.jsonl")
    c.data.chat_template = "deepseek-v3"
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.adapter.targets = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    c.quantize.format = "fp8"
    c.training.batch_size = 64
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 50
    c.mesh.data = 1
    c.mesh.fsdp = 4  # the chips of a v5p:4x4x4 divide into 4 and 16, and not into 8 and 8
    c.mesh.expert = -1
    c.training.epochs = 1
    return c
