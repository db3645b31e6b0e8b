"""What fine-tuning DeepSeek-7B takes, method by method, beside a guide's figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.config import resolve
from jaxtune.planning.plan import Plan, compile_plan
from jaxtune.planning.topology import describe
from jaxtune.training.setup import set_up
from jaxtune.training.train import choose_method

# The shape of DeepSeek-LLM-7B: https://huggingface.co/deepseek-ai/deepseek-llm-7b-base
DEEPSEEK_7B = {
    "model_type": "llama",
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
# Rows and tokens of a micro-batch. The guide states none.
ROWS, LENGTH = 1, 1024


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
      method: as it is called.
      guide: GB that the guide says it takes; empty where it has no such row.
      share: of the weights that the guide says are trained.
      chips: it is compiled for.
      adapter: section of the config.
      optimizer: its name.
    """

    method: str
    guide: str
    share: str
    chips: str
    adapter: dict[str, Any]
    optimizer: str = "adamw"


_FULL = ("40 and more", "100 %", "v5p:2x2x1", {"method": "full"})
ROWS_OF_TABLE = (
    Row("full, float32 masters and Adam", *_FULL),
    Row("full, float32 masters and Adafactor", *_FULL, optimizer="adafactor"),
    Row("LoRA, r = 8", "14–20", "0.1–1 %", "v5p:1x1x1", {"rank": 8}),
    Row("P-Tuning, 20 tokens", "10–15", "0.01 %", "v5p:1x1x1", {"method": "ptuning"}),
    Row("QLoRA (NF4), r = 8", "8–15", "0.1–1 %", "v5p:1x1x1", {"rank": 8}),
)


def sections(row: Row) -> dict[str, Any]:
    """Returns the config of a row, without its model."""
    devices = 4 if row.chips == "v5p:2x2x1" else 1
    config: dict[str, Any] = {
        "adapter": row.adapter,
        "optimizer": {"name": row.optimizer},
        "data": {"max_length": LENGTH},
        "training": {"batch_size": ROWS * devices, "remat": "full"},
        "mesh": {"data": 1, "fsdp": devices},
    }
    if "NF4" in row.method:
        config["quantize"] = {"format": "nf4"}
    return config


def planned(row: Row) -> tuple[Plan, float]:
    """Compiles a row; returns its plan and the share of the weights that are trained."""
    config, hardware = resolve(sections(row)), describe(row.chips)
    setup = set_up(config, DEEPSEEK_7B, choose_method(config)[0], hardware.devices)
    return compile_plan(setup, hardware), trained_share(parameter_summary(setup.definition))[2]


def cells(row: Row) -> list[str]:
    """Compiles a row and returns its cells: method, guide, jaxtune, and either's trained share."""
    plan, share = planned(row)
    # All devices together: sharding splits what one device would have to hold.
    total = plan.total * plan.devices / 1e9
    over = f" (4 × {plan.total / 1e9:.1f})" if plan.devices > 1 else ""
    trained = "100 %" if share == 1 else f"{share:.2%}".replace("%", " %")
    return [row.method, row.guide, f"{total:.1f}{over}", row.share, trained]


def table(rows: Sequence[Row] = ROWS_OF_TABLE) -> str:
    """Compiles every row and returns the table in Markdown, sizes in GB of all devices."""
    lines = [
        "| DeepSeek-7B | the guide, GB | jaxtune, GB | trained, the guide | jaxtune |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *_body(rows)])


def _body(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield "| " + " | ".join(cells(row)) + " |"
