"""Parameter summaries agree with manual counts and with PEFT's."""

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.full import Full
from jaxtune.adapters.parameter_summary import (
    ParameterGroup,
    parameter_summary,
    render,
    trained_share,
)
from jaxtune.adapters.projections.lora import Lora
from jaxtune.strict_json import read_object

# Of the tiny llama: vocabulary 160, hidden 64, feed-forward 96, 3 layers, 4 and 2 heads of 16.
EMBEDDING, NORM = 160 * 64, 64
LAYER = 64 * 64 + 32 * 64 + 32 * 64 + 64 * 64 + 3 * 96 * 64 + 2 * 64
BASE = 2 * EMBEDDING + 3 * LAYER + NORM


@pytest.fixture(scope="module")
def config(tiny):
    return read_object(tiny("llama") / "config.json")


def test_lora_by_hand(config):
    method = Lora(rank=4, targets=("q_proj", "k_proj", "lm_head"))
    rows = parameter_summary(define(config, "bfloat16", method))
    q, k, head = 4 * (64 + 64), 4 * (64 + 32), 4 * (64 + 160)
    assert [row for row in rows if row.kind == "trained"] == [
        ParameterGroup("lm_head", "trained", 1, head, head * 4, "float32"),
        ParameterGroup("self_attn.k_proj", "trained", 3, 3 * k, 3 * k * 4, "float32"),
        ParameterGroup("self_attn.q_proj", "trained", 3, 3 * q, 3 * q * 4, "float32"),
    ]
    frozen = {row.group: row for row in rows if row.kind == "frozen"}
    assert frozen["mlp.up_proj"] == ParameterGroup(
        "mlp.up_proj", "frozen", 3, 3 * 96 * 64, 3 * 96 * 64 * 2, "bfloat16"
    )
    assert frozen["norm"] == ParameterGroup("norm", "frozen", 1, 64, 128, "bfloat16")
    trained = head + 3 * (q + k)
    assert trained_share(rows) == (trained, BASE + trained, trained / (BASE + trained))


def test_full_training_trains_everything_in_float32(config):
    rows = parameter_summary(define(config, "bfloat16", Full()))
    assert trained_share(rows) == (BASE, BASE, 1.0)
    assert sum(row.bytes for row in rows) == 4 * BASE


def test_biases_belong_to_their_module(tiny):
    definition = define(read_object(tiny("qwen2") / "config.json"), "float32")
    row = next(row for row in parameter_summary(definition) if row.group == "self_attn.q_proj")
    assert (row.modules, row.parameters) == (3, 3 * (64 * 64 + 64))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {
            "target_modules": ["q_proj", "o_proj", "gate_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "gate_proj": 7},
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["lm_head"]},
    ],
)
def test_the_count_is_that_of_peft(tiny, config, tmp_path, settings):
    """Padded layers hold more than they train; the padding is not counted."""
    lora = LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), lora)
    trained, total = model.get_nb_trainable_parameters()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    rows = parameter_summary(define(config, "float32", method_from_peft(read_adapter(tmp_path))))
    assert trained_share(rows)[:2] == (trained, total)
    modules = {n for n, _ in model.named_modules() if n.endswith("lora_A.default")}
    assert sum(row.modules for row in rows if row.kind == "trained") == len(modules)


def test_the_table_names_groups_shares_and_bytes(config):
    text = render(parameter_summary(define(config, "bfloat16", Lora(rank=4, targets=("q_proj",)))))
    lines = text.splitlines()
    assert lines[0].split() == ["trained", "modules", "parameters", "share", "MiB", "format"]
    assert lines[1].split() == ["self_attn.q_proj", "3", "1,536", "1.340%", "0.0", "float32"]
    assert lines[2].startswith("(frozen base)")
    assert lines[2].split()[3] == f"{BASE:,}"
    assert lines[3] == f"trains 1,536 of {BASE + 1536:,} parameters (1.340%)"
