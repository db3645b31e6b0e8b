"""Bottleneck adapters have the logits and the files of AdapterHub's package.

The reference values were made by fixtures/make_adapterhub.py, because that package requires another
version of transformers than the other tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from families import Families
from oracles import Recipe, assert_same_logits, make_examples, random_tokens, relative
from parts import load_parts
from safetensors.numpy import load_file
from test_training import LENGTH, run_config, write_rows

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.parameter_summary import parameter_summary
from jaxtune.adapters.virtual.bottleneck import ACTIVATIONS, PLACEMENTS, Bottlenecks
from jaxtune.generation.sampling import Sampling
from jaxtune.layers.tree import flatten, unflatten

THEIRS = Path(__file__).parent / "fixtures" / "adapterhub"
# Initial values differ from AdapterHub's; the setting has no effect on a trained adapter.
START = {"init_weights"}
DENSE = ("llama", "qwen2", "qwen3")
EVERY = (*DENSE, "deepseek", "deepseek_v2", "deepseek_v3")
TOKENS = random_tokens(1, 2, 24)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    families = Families(tmp_path_factory.mktemp("families"))
    return lambda model_type: (tiny if model_type in DENSE else families)(model_type)


def opened(directory, adapter=None):
    return jaxtune.load(directory, adapter=adapter, dtype="float32", progress=False)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_an_adapter_of_adapterhub_gives_its_logits_and_is_written_as_it_was(name, tmp_path):
    expected = load_file(THEIRS / "logits.safetensors")
    model = opened(THEIRS / "model", THEIRS / name)
    assert_same_logits(model.logits(expected["tokens"]), expected[name])
    plain = opened(THEIRS / "model").logits(expected["tokens"])
    assert relative(plain, expected[name]) > 1e-2
    written = write_adapter(
        tmp_path / "adapter", model.method.store(model.definition, model.trainable, {})
    )
    ours, theirs = (load_file(path / "adapter.safetensors") for path in (written, THEIRS / name))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
    configs = [
        json.loads((p / "adapter_config.json").read_text()) for p in (written, THEIRS / name)
    ]
    for config in configs:
        config.pop("model_name")
        for key in START:
            config["config"].pop(key)
    assert configs[0] == configs[1]
    attention, feed_forward, reads = PLACEMENTS[name]
    method = model.method
    assert (method.attention, method.feed_forward, method.reads) == (attention, feed_forward, reads)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(activation):
    from transformers.activations import get_activation

    x = np.linspace(-4, 4, 101, dtype=np.float32)
    theirs = (
        torch.nn.functional.leaky_relu if activation == "leakyrelu" else get_activation(activation)
    )
    ours = ACTIVATIONS[activation](x)
    np.testing.assert_allclose(ours, theirs(torch.tensor(x)).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "model_type", [m if m == "qwen3" else pytest.param(m, marks=pytest.mark.slow) for m in EVERY]
)
def test_bottlenecks_start_as_the_base_and_are_stored_whole(
    model_type, placement, checkpoint, tmp_path
):
    directory = checkpoint(model_type)
    method = Bottlenecks(*PLACEMENTS[placement], 8.0, "silu", 2.0)
    parts = load_parts(directory, method)
    target = write_adapter(tmp_path / "start", method.store(parts.definition, parts.trainable, {}))
    plain = opened(directory)
    np.testing.assert_array_equal(opened(directory, target).logits(TOKENS), plain.logits(TOKENS))
    slots = ["output_adapters"] + ["attention_adapters"] * (placement == "houlsby")
    groups = {
        row.group: row for row in parameter_summary(parts.definition) if row.kind == "trained"
    }
    assert set(groups) == {f"{s}.adapter_{side}" for s in slots for side in ("down", "up")}
    assert all(row.modules == 3 for row in groups.values())
    leaves = dict(flatten(parts.trainable))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = {
        path: 0.2 * jax.random.normal(key, value.shape)
        for key, (path, value) in zip(keys, leaves.items(), strict=True)
    }
    stored = method.store(parts.definition, unflatten(drawn), {})
    target = write_adapter(tmp_path / "drawn", stored)
    assert method_from_peft(read_adapter(target)) == method
    model = opened(directory, target)
    jax.tree.map(np.testing.assert_array_equal, model.trainable, unflatten(drawn))
    logits = np.asarray(model.logits(TOKENS))
    assert relative(logits, plain.logits(TOKENS)) > 1e-2
    # Decoding with a cache applies the bottlenecks as a full pass does.
    model.stop_ids = ()
    (new,) = model.generate_tokens([TOKENS[0, :8].tolist()], 1, Sampling())
    last = np.asarray(model.logits(TOKENS[:1, :8])[0, -1])
    assert last.max() - last[new[0]] <= 1e-4 * np.abs(last).max()


@pytest.mark.slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model_type", ["qwen2", "deepseek", "deepseek_v3"])
def test_the_loss_falls_and_the_run_is_stored(model_type, placement, checkpoint, tmp_path):
    recipe = Recipe(steps=20, accumulation=1, learning_rate=1e-2, weight_decay=0.0)
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(8, longest=LENGTH))
    adapter = {"method": "bottleneck", "placement": placement, "reduction_factor": 4.0}
    config = run_config(checkpoint(model_type), rows, recipe, adapter=adapter | {"dropout": 0.05})
    run = jaxtune.train(config, tmp_path / "run")
    losses = [line["loss"] for line in run.metrics()]
    assert losses[-1] < 0.9 * losses[0]
    assert (run.adapter_directory("last") / "adapter.safetensors").is_file()
    run.model().logits(TOKENS)


def edited(tmp_path, **changes):
    """Copies an adapter and changes its config."""
    shutil.copytree(THEIRS / "houlsby", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())
    content["config"] |= changes
    path.write_text(json.dumps(content))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": [1]}, r'"leave_out"=\[1\] is not supported'),
        ({"phm_layer": True}, '"phm_layer"=True is not supported'),
        ({"ln_after": True}, '"ln_after"=True is not supported'),
        ({"scaling": "learned"}, "\"scaling\"='learned' is not supported"),
        ({"reduction_factor": {"default": 4}}, '"reduction_factor"=.* is not supported'),
        ({"non_linearity": "mish"}, 'non_linearity"="mish" is unknown'),
        ({"reduction_factor": 8}, r"has shape \[8\], the model needs \[4\]"),
        ({"reduction_factor": 0}, '"reduction_factor"=0 is not supported'),
        ({"scaling": 10**400}, '"scaling"=an integer of 1329 bits is not supported'),
        ({"dropout": 1}, '"dropout"=1 is not supported'),
        ({"mh_adapter": "no"}, "\"mh_adapter\"='no' is not supported"),
        ({"new_setting": 1}, '"new_setting"=1 is not supported'),
        ({"mh_adapter": False}, "attention_adapters.* has no place in the model"),
    ],
)
def test_unsupported_content_is_rejected_by_name(changes, message, tmp_path):
    with pytest.raises(jaxtune.JaxtuneError, match=message):
        opened(THEIRS / "model", edited(tmp_path, **changes))


def test_weights_in_a_file_of_torch_are_the_same(tmp_path):
    adapter = edited(tmp_path)
    tensors = load_file(adapter / "adapter.safetensors")
    (adapter / "adapter.safetensors").unlink()
    theirs = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(theirs, adapter / "pytorch_adapter.bin")
    stored = read_adapter(adapter).tensors
    assert set(stored) == set(tensors)
    assert all(np.array_equal(stored[name], value) for name, value in tensors.items())


def test_bottlenecks_cannot_be_merged(tmp_path):
    model = opened(THEIRS / "model", THEIRS / "pfeiffer")
    with pytest.raises(jaxtune.JaxtuneError, match=r"adapter\.method=bottleneck cannot be merged"):
        model.save_pretrained(tmp_path / "merged")
