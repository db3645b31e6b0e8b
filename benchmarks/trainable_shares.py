"""Compares the share of DeepSeek-7B that each method trains with figures in fine-tuning guides.

    python benchmarks/trainable_shares.py [--model tests/models/configs/deepseek-llm-7b.json]

Counts the parameters of the abstract model, without allocating arrays. Prints the table of
docs/methods/shares.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from jaxtune.adapters import method_from_config
from jaxtune.adapters.define import define
from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.config import load_file, resolve

ROOT = Path(__file__).resolve().parent.parent
# Shares that guides state for a model of 7 billion parameters, in percent: minimum and maximum.
GUIDES = {"full": (100, 100), "lora": (0.1, 1), "prompt": (0.001, 0.1)}
LOW_RANK = ("lora", "dora", "pissa")
ROWS = (
    ("full fine-tuning", {"method": "full"}),
    ("LoRA, r = 4, attention", {"method": "lora", "rank": 4}),
    ("LoRA, r = 8, attention", {"method": "lora", "rank": 8}),
    ("LoRA, r = 16, attention", {"method": "lora", "rank": 16}),
    ("LoRA, r = 16, all linear", {"method": "lora", "rank": 16, "targets": "all-linear"}),
    ("LoRA, r = 64, all linear", {"method": "lora", "rank": 64, "targets": "all-linear"}),
    ("DoRA, r = 16, attention", {"method": "dora", "rank": 16}),
    ("PiSSA, r = 16, attention", {"method": "pissa", "rank": 16}),
    ("VeRA, r = 256, attention", {"method": "vera", "rank": 256}),
    ("(IA)³, k, v and down", {"method": "ia3", "targets": "k_proj,v_proj"}),
    ("BitFit, attention", {"method": "bitfit"}),
    ("prompt tuning, 20 tokens", {"method": "prompt"}),
    ("prompt tuning, 100 tokens", {"method": "prompt", "virtual_tokens": 100}),
    ("P-Tuning, 20 tokens, MLP of 128", {"method": "ptuning"}),
    (
        "P-Tuning, 20 tokens, LSTM of 128",
        {"method": "ptuning", "encoder_reparameterization_type": "LSTM"},
    ),
    ("prefix tuning, 20 tokens", {"method": "prefix"}),
    ("prefix tuning, 20 tokens, projected", {"method": "prefix", "prefix_projection": True}),
    ("adapters, Pfeiffer, reduction 16", {"method": "bottleneck"}),
    ("adapters, Houlsby, reduction 16", {"method": "bottleneck", "placement": "houlsby"}),
)
RECIPES = ("domain_expert", "dialogue", "low_resource", "small_data", "low_resource_language")


def guide_of(method: str) -> str:
    """Returns the key of `GUIDES` that a method is compared with."""
    if method in LOW_RANK:
        return "lora"
    return "prompt" if method in ("prompt", "ptuning") else method


def row(name: str, section: object, model: dict[str, object]) -> str:
    """Returns a line of the table, for an ``adapter`` section and the content of config.json."""
    method = method_from_config(section)
    trained, _, share = trained_share(parameter_summary(define(model, "bfloat16", method)))
    percent, guide = 100 * share, GUIDES.get(guide_of(method.name))
    verdict, given = "", ""
    if guide:
        low, high = guide
        given = f"{low:g} %" if low == high else f"{low:g}–{high:g} %"
        verdict = "below" if percent < low else "above" if percent > high * 1.0001 else "within"
    return f"| {name} | {trained:,} | {percent:.4f} % | {given} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / "tests" / "models" / "configs" / "deepseek-llm-7b.json"
    parser.add_argument("--model", type=Path, default=default, help="config.json of the model")
    model = json.loads(parser.parse_args().model.read_text())
    print("| method | trained | share | guides | |\n|---|---|---|---|---|")
    for name, settings in ROWS:
        print(row(name, resolve({"adapter": settings}).adapter, model))
    for name in RECIPES:
        config = resolve(load_file(ROOT / "configs" / f"{name}.py"))
        print(row(f"recipe {name}", config.adapter, model))


if __name__ == "__main__":
    main()
