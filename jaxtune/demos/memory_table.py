"""Memory that fine-tuning DeepSeek-7B needs by method, compared with published estimates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.config import AdapterConfig, Config, resolve
from jaxtune.planning.plan import Plan, compile_plan
from jaxtune.planning.topology import find_topology
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
# Rows and tokens of a micro-batch; the published estimates do not state theirs.
ROWS, LENGTH = 1, 1024


@dataclasses.dataclass(frozen=True)
class TableRow:
    """A row of the table.

    Attributes:
      method: name of the method.
      published: published estimate of the memory, in GB.
      published_share: published share of trained weights.
      chips: topology to compile for.
      adapter: ``adapter`` section of the config.
      optimizer: name of the optimizer.
    """

    method: str
    published: str
    published_share: str
    chips: str
    adapter: AdapterConfig
    optimizer: str = "adamw"


_FULL = ("40 and more", "100 %", "v5p:2x2x1", AdapterConfig(method="full"))
ROWS_OF_TABLE = (
    TableRow("full, float32 masters and Adam", *_FULL),
    TableRow("full, float32 masters and Adafactor", *_FULL, optimizer="adafactor"),
    TableRow("LoRA, r = 8", "14–20", "0.1–1 %", "v5p:1x1x1", AdapterConfig(rank=8)),
    TableRow(
        "P-Tuning, 20 tokens", "10–15", "0.01 %", "v5p:1x1x1", AdapterConfig(method="ptuning")
    ),
    TableRow("QLoRA (NF4), r = 8", "8–15", "0.1–1 %", "v5p:1x1x1", AdapterConfig(rank=8)),
)


def row_config(row: TableRow) -> Config:
    """Returns the config of a row, without the model."""
    devices = 4 if row.chips == "v5p:2x2x1" else 1
    return resolve(
        {
            "adapter": row.adapter.to_dict(),
            "optimizer": {"name": row.optimizer},
            "quantize": {"format": "nf4" if "NF4" in row.method else ""},
            "data": {"max_length": LENGTH},
            "training": {"batch_size": ROWS * devices, "remat": "full"},
            "mesh": {"data": 1, "fsdp": devices},
        }
    )


def compile_row(row: TableRow) -> tuple[Plan, float]:
    """Compiles a row; returns its plan and the share of trained weights."""
    config, hardware = row_config(row), find_topology(row.chips)
    setup = set_up(config, DEEPSEEK_7B, choose_method(config.adapter)[0], hardware.devices)
    return compile_plan(setup, hardware), trained_share(parameter_summary(setup.definition))[2]


def row_cells(row: TableRow) -> list[str]:
    """Compiles a row; returns its cells: method, and published and own figures of memory and share.

    Memory is the total over all devices, in GB.
    """
    plan, share = compile_row(row)
    # The total over all devices is comparable with the memory of a single device.
    total = plan.total * plan.devices / 1e9
    over = f" (4 × {plan.total / 1e9:.1f})" if plan.devices > 1 else ""
    trained = "100 %" if share == 1 else f"{share:.2%}".replace("%", " %")
    return [row.method, row.published, f"{total:.1f}{over}", row.published_share, trained]


def memory_table(rows: Sequence[TableRow] = ROWS_OF_TABLE) -> str:
    """Compiles every row; returns a Markdown table with sizes in GB over all devices."""
    lines = [
        "| DeepSeek-7B | memory in the guide, GB | in jaxtune, GB "
        "| trained share in the guide | in jaxtune |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *_lines(rows)])


def _lines(rows: Sequence[TableRow]) -> Iterator[str]:
    for row in rows:
        yield "| " + " | ".join(row_cells(row)) + " |"
