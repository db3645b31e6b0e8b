"""DeepSeek-MoE, V2 and V3 round-trip through Hugging Face checkpoints, which others can load."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from families import reference
from oracles import assert_same_logits, make_examples, random_tokens, torch_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.adapters.define import define
from jaxtune.checkpoints import huggingface
from jaxtune.parallel.mesh import single_device_mesh

FAMILIES = ["deepseek", "deepseek_v2", "deepseek_v3"]
INDEX = "model.safetensors.index.json"
BIAS = "e_score_correction_bias"
TOKENS = random_tokens(1, 2, 24)


def tensors_of(directory: Path):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def in_bfloat16(directory: Path, target: Path) -> Path:
    """Copies a checkpoint in bfloat16, except for the correction bias, like DeepSeek's own."""
    shutil.copytree(directory, target)
    rounded = {k: v if BIAS in k else v.bfloat16() for k, v in tensors_of(directory).items()}
    save_file(rounded, target / "model.safetensors", metadata={"format": "pt"})
    return target


def assert_same_tensors(before: Path, after: Path) -> None:
    theirs, ours = tensors_of(before), tensors_of(after)
    assert set(theirs) == set(ours)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_round_trips_bit_for_bit(family, dtype, families, tmp_path):
    theirs = families(family)
    if dtype == "bfloat16":
        theirs = in_bfloat16(theirs, tmp_path / "in")
    model = jaxtune.load(theirs, dtype=dtype, progress=False)
    ours = model.save_pretrained(tmp_path / "out")
    assert_same_tensors(theirs, ours)
    names = set(tensors_of(ours))
    assert {f"model.layers.2.mlp.experts.{i}.up_proj.weight" for i in range(8)} <= names
    biases = [value for name, value in tensors_of(ours).items() if BIAS in name]
    assert len(biases) == (2 if family == "deepseek_v3" else 0)
    assert all(value.dtype == torch.float32 for value in biases)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_checkpoint_is_read_by_torch_and_by_us(family, families, tmp_path):
    source = huggingface.HuggingFaceSource(families(family))
    definition = define(source.config, "float32")
    tree, _ = huggingface.load(definition, source, single_device_mesh(), progress=False)
    ours = huggingface.save(tmp_path / "out", definition, tree, shard_bytes=50_000)
    index = json.loads((ours / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert_same_tensors(families(family), ours)
    expected = torch_logits(reference(families(family)), TOKENS)
    assert (torch_logits(reference(ours), TOKENS) == expected).all()
    again = jaxtune.load(ours, dtype="float32", progress=False)
    assert_same_logits(again.logits(TOKENS), expected)
    if family != "deepseek":
        _, info = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
        assert not any(info.values()), info


def test_a_multi_token_prediction_layer_is_skipped_with_a_reason(families, tmp_path, caplog):
    theirs = tmp_path / "in"
    shutil.copytree(families("deepseek_v3"), theirs)
    tensors = tensors_of(theirs)
    extra = {
        name.replace("layers.2.", "layers.3."): value.clone()
        for name, value in tensors.items()
        if "layers.2." in name
    }
    extra["model.layers.3.eh_proj.weight"] = torch.ones(64, 128)
    extra["model.layers.3.shared_head.head.weight"] = torch.ones(160, 64)
    save_file(tensors | extra, theirs / "model.safetensors", metadata={"format": "pt"})
    source = huggingface.HuggingFaceSource(theirs)
    definition = define(source.config, "float32")
    _, ignored = huggingface.load(definition, source, single_device_mesh(), progress=False)
    assert set(ignored) == set(extra)
    assert all("multi-token-prediction" in reason for reason in ignored.values())
    ours = jaxtune.load(theirs, dtype="float32", progress=False)
    assert_same_logits(
        ours.logits(TOKENS), torch_logits(reference(families("deepseek_v3")), TOKENS)
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(r._asdict()) + "\n" for r in make_examples(2, longest=8)))
    config = {
        "model": {"path": str(theirs)},
        "data": {"train": str(rows), "max_length": 8},
        "adapter": {"rank": 1, "targets": "o_proj"},
        "training": {"steps": 0, "batch_size": 1},
        "logging": {"tensorboard": False},
    }
    with caplog.at_level(logging.INFO):
        jaxtune.train(config, tmp_path / "run")
    assert all(name in caplog.text for name in extra)
