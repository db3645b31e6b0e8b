"""LoRA of fused experts has the same logits in PEFT, in both directions."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from families import reference
from oracles import assert_same_logits, random_tokens, relative, torch_logits
from parts import load_parts
from peft import LoraConfig, PeftModel, get_peft_model
from test_peft import with_random_factors

import jaxtune
from jaxtune.adapter_files.fused import fuse
from jaxtune.adapter_files.pairs import pairs_of
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters.projections.dora import Dora
from jaxtune.adapters.projections.lora import Lora

TOKENS = random_tokens(1, 2, 24)
OURS = {
    "all-linear": Lora(2, 3.0, targets=("all-linear",)),
    "ranks": Lora(
        2,
        3.0,
        targets=("all-linear",),
        rslora=True,
        rank_pattern=((r"experts\.[0-3]\.up_proj", 3), ("shared_experts.up_proj", 4)),
        alpha_pattern=((r"experts\.5\.gate_proj", 7.0),),
    ),
    "one-projection": Lora(2, 3.0, targets=(r".*layers\.1\.mlp\.experts\.[25]\.up_proj",)),
    "outer": Lora(2, 3.0, targets=(r".*experts\.\d+\.down_proj", "o_proj")),
    "no-experts": Lora(2, 3.0, targets=(r".*layers\.0\.mlp\.\w+", "shared_experts.down_proj")),
}
THEIRS = {
    "both": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate-up": {"target_parameters": ["mlp.experts.gate_up_proj"], "use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": ["o_proj"],
        "target_parameters": [
            "experts.down_proj",
            "model.layers.2.mlp.experts.gate_up_proj",
            "shared_experts.up_proj.weight",
        ],
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 5, "up_proj.weight": 1},
        "alpha_pattern": {"experts.gate_up_proj": 9, "up_proj.weight": 4},
    },
}


def crossed(cases, quick):
    """Returns the parameters of every case with every family; all but one are slow."""
    return [
        pytest.param(
            family,
            case,
            marks=() if (family, case) == ("deepseek_v3", quick) else pytest.mark.slow,
            id=f"{family}-{case}",
        )
        for family in ("deepseek_v2", "deepseek_v3")
        for case in cases
    ]


def loaded_by_peft(directory, adapter):
    return torch_logits(PeftModel.from_pretrained(reference(directory), adapter).eval(), TOKENS)


def load(directory, adapter):
    return jaxtune.load(directory, adapter=adapter, dtype="float32", progress=False)


@pytest.mark.parametrize(("family", "case"), crossed(OURS, quick="ranks"))
def test_peft_loads_what_we_train(family, case, families, tmp_path):
    directory, method = families(family), OURS[case]
    parts = with_random_factors(load_parts(directory, method))
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    write_adapter(tmp_path / "ours", stored)
    write_adapter(tmp_path / "fused", fuse(stored, parts.definition))
    ours = load(directory, tmp_path / "ours").logits(TOKENS)
    theirs = loaded_by_peft(directory, tmp_path / "fused")
    assert_same_logits(ours, theirs)
    assert relative(theirs, torch_logits(reference(directory), TOKENS)) > 1e-2
    assert_same_logits(load(directory, tmp_path / "fused").logits(TOKENS), theirs)
    # Reading separates gate and up projection again, without increasing the largest rank.
    before, after = pairs_of(stored), pairs_of(read_adapter(tmp_path / "fused"))
    for name, pair in before.items():
        np.testing.assert_allclose(after[name].edit, pair.edit, atol=1e-5)
    assert max(len(p.lora_A) for p in after.values()) == max(len(p.lora_A) for p in before.values())


@pytest.mark.parametrize(("family", "case"), crossed(THEIRS, quick="patterns"))
def test_we_load_what_peft_trains(family, case, families, tmp_path):
    directory = families(family)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": []} | THEIRS[case]
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = get_peft_model(reference(directory), config).eval()
    theirs = torch_logits(model, TOKENS)
    model.save_pretrained(tmp_path / "adapter")
    ours = load(directory, tmp_path / "adapter")
    assert_same_logits(ours.logits(TOKENS), theirs)
    again = fuse(read_adapter(tmp_path / "adapter"), ours.definition)
    write_adapter(tmp_path / "again", again)
    assert_same_logits(loaded_by_peft(directory, tmp_path / "again"), theirs)
    # Factors that gate and up projection share are stored once.
    shapes = {key: value.shape for key, value in again.tensors.items()}
    saved = {
        key.replace(".base_layer", ""): shape
        for key, shape in _shapes(tmp_path / "adapter").items()
    }
    assert {key.replace(".base_layer", ""): shape for key, shape in shapes.items()} == saved


def _shapes(directory):
    from safetensors import safe_open

    with safe_open(directory / "adapter_model.safetensors", "np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("version", ["0.18.1", None])
def test_the_layout_of_older_versions_is_rejected(version, families, tmp_path):
    directory = families("deepseek_v3")
    config = LoraConfig(r=2, target_modules=[], **THEIRS["both"])
    get_peft_model(reference(directory), config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": version}))
    with pytest.raises(
        jaxtune.JaxtuneError, match=f'"target_parameters" with peft_version={version!r}'
    ):
        read_adapter(tmp_path / "adapter")


def test_adapters_without_a_fused_form_in_peft_are_unchanged_and_logged(families, caplog):
    method = Dora(2, 3.0, targets=("down_proj",))
    parts = load_parts(families("deepseek_v3"), method)
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    with caplog.at_level(logging.WARNING, "jaxtune"):
        assert fuse(stored, parts.definition) is stored
    assert "fused experts with DoRA" in caplog.text
