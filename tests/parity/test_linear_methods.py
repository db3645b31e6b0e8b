"""Every method on projections starts as the base, decodes, merges, and is stored and loaded."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from families import Families
from oracles import LOSS, Recipe, assert_same_logits, make_examples, random_tokens, relative
from parts import load_parts, train_on_eight_devices
from test_families import decode
from test_training import LENGTH, run_config, write_rows

import jaxtune
from jaxtune.adapter_files.peft import write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.parameter_summary import parameter_summary, trained_share
from jaxtune.adapters.projections.bitfit import BitFit
from jaxtune.adapters.projections.dora import Dora
from jaxtune.adapters.projections.ia3 import IA3
from jaxtune.adapters.projections.lora import Lora
from jaxtune.adapters.projections.pissa import Pissa
from jaxtune.adapters.projections.vera import Vera
from jaxtune.api import Model
from jaxtune.layers.tree import flatten, unflatten
from jaxtune.parallel.mesh import single_device_mesh

TOKENS = random_tokens(1, 2, 12)
SHOWS = 1e-3  # a change of the logits beyond any rounding error
# Rounding error of a scale that is 1 by a division, or of a weight split into two summands.
ROUNDED = 1e-5
ALL = ("all-linear",)
# On a model with two blocks, dense layers and experts: all projections, latent attention included.
METHODS = {
    "lora": Lora(4, 8.0, targets=(*ALL, "lm_head")),
    "rslora": Lora(4, 8.0, targets=ALL, rslora=True),
    "dora": Dora(4, 8.0, targets=(*ALL, "lm_head")),
    "pissa": Pissa(4, 8.0, targets=ALL),
    "vera": Vera(24, targets=(*ALL, "lm_head")),
    "ia3": IA3(("kv_b_proj", "kv_a_proj_with_mqa", "up_proj"), ("down_proj", "o_proj")),
    "bitfit": BitFit(ALL),
}
SOME = r"model\.layers\.[02]\..*(q_b_proj|kv_b_proj|experts\.[13]\.down_proj)"
SOME_LAYERS = {
    "lora": Lora(4, 8.0, targets=(SOME,)),
    "dora": Dora(4, 8.0, targets=(SOME,)),
    "pissa": Pissa(4, 8.0, targets=(SOME,)),
    "vera": Vera(24, targets=(SOME,)),
    "ia3": IA3((SOME,), ("up_proj",)),
    "bitfit": BitFit((SOME,)),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return Families(tmp_path_factory.mktemp("families"))("deepseek_v3")


@pytest.fixture(scope="module")
def base(directory):
    """The logits of the checkpoint without an adapter."""
    return np.asarray(jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS))


def as_model(parts, directory):
    return Model(parts, directory, single_device_mesh(), dtype="float32")


def moved(parts):
    """Adds noise to every trained array, also where a method has no effect."""
    leaves = dict(flatten(parts.trainable))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    drawn = {
        path: value + 0.1 * jax.random.normal(key, value.shape)
        for (path, value), key in zip(leaves.items(), keys, strict=True)
    }
    return parts._replace(trainable=unflatten(drawn))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "bitfit" else pytest.mark.slow) for n in METHODS]
)
def test_a_run_starts_as_the_base_and_ends_as_one_model(name, directory, base, tmp_path):
    method = METHODS[name]
    parts = load_parts(directory, method)
    start = np.asarray(as_model(parts, directory).logits(TOKENS))
    if name in ("dora", "pissa"):
        assert relative(start, base) <= ROUNDED
    else:
        assert np.array_equal(start, base)
    parts = moved(parts)
    model = as_model(parts, directory)
    expected = np.asarray(model.logits(TOKENS))
    assert relative(expected, base) > SHOWS
    # When decoding, latent attention uses the edited matrix and bias directly.
    assert_same_logits(decode(model, TOKENS, 5), expected)
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    adapter = write_adapter(tmp_path / "adapter", stored)
    again = jaxtune.load(directory, adapter=adapter, dtype="float32", progress=False)
    assert_same_logits(again.logits(TOKENS), expected)
    if name == "bitfit":
        with pytest.raises(jaxtune.JaxtuneError, match=r"has no bias .* cannot be merged"):
            model.save_pretrained(tmp_path / "merged")
        return
    merged = model.save_pretrained(tmp_path / "merged")
    plain = jaxtune.load(merged, dtype="float32", progress=False)
    assert_same_logits(plain.logits(TOKENS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME_LAYERS)
def test_an_edit_leaves_all_other_layers_and_experts_unchanged(name, directory, base, tmp_path):
    method = SOME_LAYERS[name]
    parts = moved(load_parts(directory, method))
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    modules = {key.split(".lora")[0].split(".vera_l")[0] for key in stored.tensors}
    assert not any(".layers.1." in module for module in modules) or name == "ia3"
    assert not any(".experts.0.down" in module for module in modules)
    again = method_from_peft(stored)
    restored = load_parts(directory, again)
    trainable, constants = again.restore(restored.definition, stored)
    trees = again.complete(restored.definition, restored.base, (trainable, constants), None)
    restored = restored._replace(trainable=trees[0], constants=trees[1])
    # The file contains the chosen layers only, so noise on the others must have no effect.
    expected = np.asarray(as_model(parts, directory).logits(TOKENS))
    assert relative(expected, base) > SHOWS
    assert_same_logits(as_model(restored, directory).logits(TOKENS), expected)
    stored_values = sum(value.size for key, value in stored.tensors.items() if "vera_A" not in key)
    if name not in ("vera", "pissa"):  # whose files contain more than the trained values
        assert trained_share(parameter_summary(parts.definition))[0] == stored_values


def test_bitfit_trains_existing_biases_and_merges_them(tiny, tmp_path):
    directory = tiny("qwen2")
    method = BitFit(("o_proj",))
    parts = load_parts(directory, method)
    plain = np.asarray(jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS))
    assert np.array_equal(as_model(parts, directory).logits(TOKENS), plain)
    names = set(method.store(parts.definition, parts.trainable, parts.constants).tensors)
    assert names == {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.bias"
        for layer in range(3)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    model = as_model(moved(parts), directory)
    expected = np.asarray(model.logits(TOKENS))
    assert relative(expected, plain) > SHOWS
    merged = model.save_pretrained(tmp_path / "merged")
    ours = jaxtune.load(merged, dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "vera"])
def test_eight_devices_train_as_one_does(method, directory, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(16, longest=LENGTH))
    recipe = Recipe(steps=3, accumulation=1, warmup_steps=1)
    adapter = {"method": method, "rank": 4, "targets": "all-linear"}
    config = run_config(directory, rows, recipe, adapter=adapter)
    expected = jaxtune.train(config, tmp_path / "one").metrics()
    config["mesh"] = {"data": 2, "tensor": 2, "expert": 2}
    train_on_eight_devices({tmp_path / "eight": config})
    ours = jaxtune.Run(tmp_path / "eight").metrics()
    assert len(ours) == len(expected) == 3
    for line, other in zip(ours, expected, strict=True):
        assert relative(line["loss"], other["loss"]) <= LOSS, line
