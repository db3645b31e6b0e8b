"""Every method trains over a quantized base and leaves it unchanged."""

import json

import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.config import resolve
from jaxtune.layers.tree import flatten

METHODS = {
    "lora": {"targets": ("all-linear",)},
    "lora, rank-stabilised": {"targets": ("all-linear",), "rslora": True},
    "dora": {"targets": ("q_proj", "down_proj")},
    "pissa": {"targets": ("o_proj", "up_proj")},
    "vera": {"targets": ("o_proj",)},
    "ia3": {"targets": ("o_proj",)},
    "bitfit": {"targets": ("o_proj", "down_proj")},
    "prompt": {"virtual_tokens": 3},
    "ptuning": {"virtual_tokens": 3},
    "prefix": {"virtual_tokens": 3},
    "bottleneck": {"reduction_factor": 4.0},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of token rows that repeat: any method can learn some of them."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    generator = np.random.default_rng(0)
    start = generator.integers(3, 160, 12).tolist()
    lines = [json.dumps({"input_ids": start, "labels": start}) for _ in range(4)]
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(model, rows, form, method, adapter):
    return resolve(
        {
            "model": {"path": str(model)},
            "data": {"train": str(rows), "max_length": 16, "packing": False},
            "adapter": {"method": method, "rank": 4, "alpha": 8.0, **adapter},
            "quantize": {"format": form},
            "training": {"steps": 6, "batch_size": 4, "dtype": "float32", "remat": "full"},
            "optimizer": {"learning_rate": 0.02, "schedule": "constant", "clip_norm": 1.0},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("llama", "nf4")])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_over_a_quantized_base(tiny, rows, tmp_path, name, kind, form):
    adapter, model = METHODS[name], tiny(kind, num_hidden_layers=2)
    config = settings(model, rows, form, name.split(",")[0], adapter)
    run = jaxtune.train(config.to_dict(), tmp_path / "run")
    losses = [line["loss"] for line in run.metrics()]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1e-3, losses
    trained = run.model("last")
    described = json.loads((tmp_path / "run" / "description.json").read_text())
    assert form in {row["format"] for row in described["model"]["modules"]}
    # What the run saved, over the same quantized base, goes on where it ended.
    base = jaxtune.load(model, quantize=form, dtype="float32", progress=False)
    tokens = np.arange(3, 15)[None]
    assert np.abs(trained.logits(tokens) - base.logits(tokens)).max() > 1e-3
    if name != "pissa":  # which edits the base once, before it is quantized
        ours, plain = dict(flatten(trained.base)), dict(flatten(base.base))
        same = [jax.tree.all(jax.tree.map(np.array_equal, ours[p], plain[p])) for p in plain]
        assert all(same)
