"""An adapter to start from: what it brings, what of the config counts, and what the log says."""

from __future__ import annotations

import logging

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jaxtune.config import resolve
from jaxtune.training.train import choose_method


@pytest.fixture
def adapter(tiny, tmp_path):
    """An adapter with settings of its own."""
    settings = {"r": 3, "lora_dropout": 0.1, "target_modules": ["q_proj"], "use_rslora": True}
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def test_the_log_says_what_it_brings_and_what_it_replaces(adapter, caplog):
    section = {"init_from": adapter, "rank": 8, "targets": "v_proj", "modules_to_save": "lm_head"}
    with caplog.at_level(logging.INFO, "jaxtune"):
        method, stored = choose_method(resolve({"adapter": section | {"dropout": 0.25}}).adapter)
    assert stored is not None and {f.rank for _, f in method.factors} == {3}
    assert method.dropout == 0.25  # of training, and so of the config
    brings, replaces = (record.getMessage() for record in caplog.records[-2:])
    assert (
        f"starting from {adapter}: r=3, lora_alpha=8, use_rslora=True, target_modules=q_proj"
        in (brings)
    )
    assert replaces.endswith(
        "adapter.rank=8, adapter.targets=v_proj, adapter.modules_to_save=lm_head"
    )
    assert "adapter.dropout=0.25 replaces the adapter's 0.1" in caplog.text


def test_nothing_is_said_to_be_replaced_where_nothing_is_set(adapter, caplog):
    with caplog.at_level(logging.INFO, "jaxtune"):
        method, _ = choose_method(resolve({"adapter": {"init_from": adapter}}).adapter)
    assert method.dropout == 0
    assert "without effect" not in caplog.text
