"""Adding a method takes one file (`gain.py`) and a line in each registry."""

import json

import gain
import numpy as np
import pytest

import jaxtune
from jaxtune.adapters import PEFT_TYPES, method_from_config
from jaxtune.adapters.parameter_summary import parameter_summary
from jaxtune.config import resolve
from jaxtune.registry import METHODS, Entry
from jaxtune.training.setup import set_up

DENSE = ("llama", "qwen2", "qwen3")
MIXTURES = ("deepseek", "deepseek_v2", "deepseek_v3")
SLOW = ("qwen2", "deepseek", "deepseek_v2")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(METHODS, "gain", Entry("gain:from_config", ("targets",)))
    monkeypatch.setitem(PEFT_TYPES, "GAIN", gain.from_peft)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    tokens = np.random.default_rng(0).integers(3, 160, 12).tolist()
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text((json.dumps({"input_ids": tokens, "labels": tokens}) + "\n") * 2)
    return path


@pytest.mark.parametrize("form", ["", "nf4"])
@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in (*DENSE, *MIXTURES)],
)
def test_it_works_with_every_architecture(tiny, families, rows, tmp_path, kind, form):
    model = families(kind) if kind in MIXTURES else tiny(kind, num_hidden_layers=2)
    run = jaxtune.train(
        {
            "model": {"path": str(model)},
            "data": {"train": str(rows), "max_length": 16, "packing": False},
            "adapter": {"method": "gain", "targets": ("all-linear",)},
            "quantize": {"format": form},
            "training": {"steps": 4, "batch_size": 2, "dtype": "float32"},
            "optimizer": {"learning_rate": 0.02, "schedule": "constant"},
        },
        tmp_path / "run",
    )
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < losses[0] - 1e-3, losses
    setup = set_up(
        run.config,
        json.loads((model / "config.json").read_text()),
        method_from_config(run.config.adapter),
    )
    trained = {row.group for row in parameter_summary(setup.definition) if row.kind == "trained"}
    assert any("self_attn" in group for group in trained)
    assert (kind in MIXTURES) == any("mlp.experts" in group for group in trained)

    tokens = np.arange(3, 15)[None]
    with_adapter = np.asarray(run.model("last").logits(tokens))
    base = np.asarray(run.model("none").logits(tokens))
    assert np.abs(with_adapter - base).max() > 1e-3
    if not form:  # stored, read again and merged: without a line about this method
        merged = run.model("last").save_pretrained(tmp_path / "merged", "float32")
        again = np.asarray(jaxtune.load(merged, dtype="float32", progress=False).logits(tokens))
        # Float32 rounding: of a product and its scale, in one order or the other.
        np.testing.assert_allclose(again, with_adapter, atol=2e-5 * np.abs(with_adapter).max())


def test_a_config_selects_it_by_name():
    section = resolve({"adapter": {"method": "gain", "targets": ("q_proj",)}}).adapter
    assert method_from_config(section) == gain.Gain(("q_proj",))
