"""Full fine-tuning with frozen parts: which weights change, and that the result is one model."""

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.adapters import method_from_config
from jaxtune.adapters.define import define
from jaxtune.adapters.full import Full
from jaxtune.checkpoints.formats.safetensors import read_all
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.strict_json import read_object

FREEZE = ("model.embed_tokens", "model.layers.0.", r"model\.layers\.\d+\.input_layernorm")


def frozen(name):
    return name.startswith(FREEZE[:2]) or name.endswith("input_layernorm.weight")


def test_blocks_are_split_where_what_is_trained_changes(tiny):
    config = read_object(tiny("llama") / "config.json")
    definition = define(config, "bfloat16", Full(FREEZE))
    assert [(blocks.first, blocks.count) for blocks in definition.blocks] == [(0, 1), (1, 2)]
    for path, leaf in definition.leaves.items():
        first = leaf.declaration.layers[0] if leaf.declaration.layers else 0
        name = ".".join((*path[:2], str(first), *path[3:])) if "layers" in path else ".".join(path)
        assert leaf.kind == ("base" if frozen(name) else "trainable"), name
        assert str(leaf.dtype) == ("bfloat16" if frozen(name) else "float32")


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (
            "model.leyers.0",
            'adapter.freeze: "model.leyers.0" matches the start of no name; did you mean '
            '"model.layers.0"?',
        ),
        ("model.embed", 'adapter.freeze: "model.embed" matches the start of no name'),
        ("model.(", 'adapter.freeze: "model.(" is not a valid regular expression: '),
        (".*", "adapter.freeze leaves nothing to train"),
    ],
)
def test_an_impossible_freeze_is_rejected(freeze, message, tiny):
    config = read_object(tiny("llama") / "config.json")
    with pytest.raises(JaxtuneError) as error:
        section = resolve({"adapter": {"method": "full", "freeze": [freeze]}}).adapter
        define(config, "float32", method_from_config(section))
    assert str(error.value).startswith(message)


def _frozen_layers(tiny, pattern):
    config = read_object(tiny("llama") / "config.json") | {"num_hidden_layers": 12}
    definition = define(config, "float32", Full((pattern,)))
    return {
        layer
        for path, leaf in definition.leaves.items()
        if leaf.kind == "base" and leaf.declaration.layers
        for layer in range(leaf.declaration.layers[0], sum(leaf.declaration.layers))
    }


@pytest.mark.parametrize("pattern", ["model.layers.1", "model.layers.1.", r"model\.layers\.1\."])
def test_the_name_of_a_layer_freezes_that_layer_only(tiny, pattern):
    assert _frozen_layers(tiny, pattern) == {1}


def test_a_dot_that_matches_more_than_a_dot_is_reported(tiny, caplog):
    assert _frozen_layers(tiny, "model.layers.[01].") == {0, 1, 10, 11}
    (message,) = [record.message for record in caplog.records if "adapter.freeze" in record.message]
    assert "freezes 36 weights, 18 of which only because" in message
    assert "such as model.layers.10." in message
    assert r'"model\.layers\.[01]\." leaves them out' in message
    caplog.clear()
    assert _frozen_layers(tiny, r"model\.layers\.[01]\.") == {0, 1}
    assert not caplog.records


def test_frozen_weights_stay_bit_for_bit_and_all_others_change(tiny, tmp_path):
    directory = tiny("llama")
    rows = [{"input_ids": list(range(3, 20)), "labels": list(range(3, 20))}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(directory)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 32},
        "adapter": {"method": "full", "freeze": FREEZE},
        "training": {"steps": 2, "batch_size": 2, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-2},
        "logging": {"tensorboard": False},
    }
    model = jaxtune.train(config, tmp_path / "run").model("last")
    after = read_all(model.save_pretrained(tmp_path / "model") / "model.safetensors")
    before = read_all(directory / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if frozen(name)}
