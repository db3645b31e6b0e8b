"""LoRA on DeepSeek-V3, with its 671 billion weights frozen in the published fp8.

  jaxtune train --config configs/deepseek_v3.py --config.data.train=mine.jsonl \
      --workdir runs/deepseek_v3

Memory per device:

  jaxtune plan --config configs/deepseek_v3.py --topology v5p:4x4x4

The fp8 blocks of the checkpoint are kept bit for bit and split over the devices: the experts along
mesh.expert, the hidden dimension along mesh.fsdp. The batch is split along both axes, with one row
per device. The attention projections are adapted, except kv_b_proj, whose edits vLLM cannot load.
On 512 chips (v5p:8x8x8), set mesh.fsdp=64 and training.batch_size=512. quantize.format=int4 halves
the weights: docs/scaling.md.
"""

from pathlib import Path

import ml_collections

from jaxtune import config

HERE = Path(__file__).resolve().parent


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the recipe."""
    c = config.load_file(HERE / "bases" / "lora.py")
    c.model.path = "deepseek-ai/DeepSeek-V3"
    c.data.train = str(HERE / "data" / "dialogue.jsonl")
    c.data.chat_template = "deepseek-v3"
    c.adapter.rank = 8
    c.adapter.alpha = 16.0
    c.adapter.targets = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
    c.quantize.format = "fp8"
    c.training.batch_size = 64
    c.training.epochs = 1
    c.optimizer.learning_rate = 1e-4
    c.mesh.data = 1
    c.mesh.fsdp = 4  # the chips of a v5p:4x4x4 divide into 4 and 16, but not into 8 and 8
    c.mesh.expert = -1
    return c
