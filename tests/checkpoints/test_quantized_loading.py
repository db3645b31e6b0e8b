"""Models whose frozen weights are quantized while they stream in."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxtune
from jaxtune.adapters.define import define
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints import quantize as quantizing
from jaxtune.checkpoints.quantize import read_quantized
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import flatten, layer_names, unflatten
from jaxtune.parallel.mesh import make_mesh, single_device_mesh
from jaxtune.quant import Quantization
from jaxtune.quant.fp8 import Float8
from jaxtune.quant.int4 import Int4
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import NormalFloat4
from jaxtune.quant.weight import QuantizedWeight

TOKENS = np.arange(3, 35).reshape(2, 16)
FORMATS = [NormalFloat4(), Int4(), Int4(symmetric=False), Int8(), Float8()]
MOE = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
}


def quantized_leaves(model):
    return {p: leaf for p, leaf in flatten(model.base) if isinstance(leaf, QuantizedWeight)}


def load_tree(directory, quantization):
    source = huggingface.open_source(directory)
    definition = define(source.config, "float32", quantization=quantization)
    tree, _ = huggingface.load(definition, source, single_device_mesh(), progress=False)
    return dict(flatten(tree))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("kind", ["llama", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_a_quantized_model_computes_with_its_dequantized_weights(tiny, kind, form):
    directory = tiny(kind, **(MOE if kind == "deepseek_v3" else {}))
    settings = {"format": form.name}
    if isinstance(form, Int4):
        settings |= {"symmetric": form.symmetric}
    model = jaxtune.load(directory, quantize=settings, dtype="float32", progress=False)
    leaves = quantized_leaves(model)
    names = {path[-2] for path in leaves}
    assert {"o_proj", "gate_proj", "up_proj", "down_proj"} <= names and "lm_head" not in names
    assert all(leaf.format == form for leaf in leaves.values())
    plain = jaxtune.load(directory, dtype="float32", progress=False)
    exact = plain.logits(TOKENS)
    replaced = {
        path: leaf.dequantize(jnp.float32) if isinstance(leaf, QuantizedWeight) else leaf
        for path, leaf in flatten(model.base)
    }
    plain.base = unflatten(replaced)
    ours, same = np.asarray(model.logits(TOKENS)), np.asarray(plain.logits(TOKENS))
    # The same products of the same float32 numbers, compiled another way.
    assert np.abs(ours - same).max() <= 1e-5 * np.abs(same).max()
    assert np.abs(ours - exact).max() > 1e-3 * np.abs(same).max()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_tensor_is_the_same_in_one_chunk_and_in_many(tmp_path, form, monkeypatch):
    generator = np.random.default_rng(0)
    weights = {
        "even": generator.standard_normal((640, 128)).astype(np.float32),
        "odd": generator.standard_normal((389, 65)).astype(np.float32),
    }
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = huggingface.open_source(tmp_path)
    for name in weights:
        whole = read_quantized(source, name, form)
        monkeypatch.setattr(quantizing, "CHUNK", 1)
        cut = read_quantized(source, name, form)
        monkeypatch.undo()
        assert whole.keys() == cut.keys() == form.parts(weights[name].shape).keys()
        for key, value in whole.items():
            assert np.array_equal(value, cut[key]), (name, key)


def test_a_value_that_is_not_finite_is_named(tmp_path):
    weight = np.ones((300, 64), np.float32)
    weight[290, 3] = np.nan
    save_file({"w.weight": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    source = huggingface.open_source(tmp_path)
    with pytest.raises(JaxtuneError, match=r"w\.weight: 1 of 19,200 values is NaN or"):
        read_quantized(source, "w.weight", NormalFloat4())


def write_fp8(directory, tiny, block):
    """Rewrites a tiny V3 in DeepSeek's own format; returns the codes and scales by name."""
    source = tiny("deepseek_v3", **MOE)
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": list(block),
    }
    (directory / "config.json").write_text(json.dumps(config))
    opened, generator = huggingface.open_source(source), np.random.default_rng(0)
    tensors, stored = {}, {}
    for name in opened.names():
        value = opened.read(name)
        if value.ndim < 2 or any(part in name for part in ("embed", "lm_head", "mlp.gate.")):
            tensors[name] = value
            continue
        blocks = [-(-n // size) for n, size in zip(value.shape, block, strict=True)]
        scale = generator.uniform(0.5, 2, blocks).astype(np.float32)
        codes = value.astype(ml_dtypes.float8_e4m3fn)
        tensors[name], tensors[name + "_scale_inv"] = codes, scale
        stored[name] = codes, scale
    save_file(tensors, directory / "model.safetensors")
    return stored


def test_an_fp8_checkpoint_stays_as_it_is_on_disk(tiny, tmp_path):
    block = (16, 32)
    stored = write_fp8(tmp_path / "fp8", tiny, block)
    model = jaxtune.load(tmp_path / "fp8", quantize="fp8", dtype="float32", progress=False)
    seen = 0
    for path, leaf in quantized_leaves(model).items():
        assert leaf.format == Float8(block)
        declared = model.definition.leaves[path].declaration
        for part, name in enumerate(layer_names(path, declared)):
            place = np.unravel_index(part, declared.stack_shape)
            codes, scale = stored[name]
            assert np.array_equal(leaf.parts["codes"][place], codes.view(np.uint8))
            assert np.array_equal(leaf.parts["scale"][place], scale)
            seen += 1
    assert seen == len(stored)
    wide = jaxtune.load(tmp_path / "fp8", dtype="float32", progress=False).logits(TOKENS)
    ours = model.logits(TOKENS)
    assert np.abs(ours - wide).max() <= 1e-5 * np.abs(wide).max()


def test_an_fp8_checkpoint_is_quantized_to_nf4_from_its_values(tiny, tmp_path):
    write_fp8(tmp_path / "fp8", tiny, (16, 32))
    model = jaxtune.load(tmp_path / "fp8", dtype="float32", progress=False)
    model.save_pretrained(tmp_path / "wide")
    wide = load_tree(tmp_path / "wide", Quantization(NormalFloat4()))
    direct = load_tree(tmp_path / "fp8", Quantization(NormalFloat4()))
    for path, leaf in direct.items():
        assert jax.tree.all(jax.tree.map(np.array_equal, leaf, wide[path])), path
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert "quantization_config" not in config  # for what is written there is not quantized


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_saving_writes_the_dequantized_weights(tiny, tmp_path, form):
    directory = tiny("qwen2")
    leaves = load_tree(directory, Quantization(form))
    model = jaxtune.load(directory, quantize=form.name, dtype="float32", progress=False)
    model.save_pretrained(tmp_path / "saved")
    saved = huggingface.open_source(tmp_path / "saved")
    checked = 0
    for path, leaf in leaves.items():
        if isinstance(leaf, QuantizedWeight) and form != Int4(symmetric=False):
            decoded = np.asarray(leaf.dequantize(jnp.float32))
            declared = model.definition.leaves[path].declaration
            for part, name in enumerate(layer_names(path, declared)):
                assert np.array_equal(saved.read(name), decoded[part])
                checked += 1
    assert checked or form == Int4(symmetric=False)


def test_the_head_is_quantized_on_request(tiny):
    settings = {"format": "int8", "modules": ("all-linear", "lm_head")}
    model = jaxtune.load(tiny("llama"), quantize=settings, dtype="float32", progress=False)
    assert isinstance(model.base["lm_head"]["weight"], QuantizedWeight)
    plain = jaxtune.load(tiny("llama"), dtype="float32", progress=False).logits(TOKENS)
    assert 0 < np.abs(model.logits(TOKENS) - plain).max() < 0.1 * np.abs(plain).max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "nf5"}, 'quantize.format="nf5" is unknown; did you mean "nf4"'),
        ({"format": "int4", "group": 3}, 'unknown config key "quantize.group"; did you mean'),
        (
            {"format": "int8", "modules": ("q_prjo",)},
            'quantize.modules: "q_prjo" matches no',
        ),
        (
            {"format": "int8", "modules": (r".*layers\.0\.self_attn\.q_proj",)},
            "quantize.modules: selects model.layers.0.self_attn.q_proj but not model.layers.1",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(tiny, settings, message):
    with pytest.raises(JaxtuneError) as error:
        jaxtune.load(tiny("llama"), quantize=settings, progress=False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_training_every_weight_leaves_nothing_to_quantize(tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}\n')
    config = resolve(
        {
            "model": {"path": str(tiny("llama"))},
            "data": {"train": str(rows)},
            "adapter": {"method": "full"},
            "quantize": {"format": "nf4"},
        }
    )
    with pytest.raises(JaxtuneError, match=r"trained weights cannot be quantized"):
        jaxtune.train(config.to_dict(), tmp_path / "run")


def test_parts_lie_on_a_mesh_as_their_weights_do():
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1, "expert": 1, "sequence": 1})
    declared = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256}
    config = {"model_type": "llama", "vocab_size": 64, "num_attention_heads": 4, **declared}
    definition = define(config, "bfloat16", quantization=Quantization(NormalFloat4()))
    base = dict(flatten(definition.abstract("base", mesh)))
    down = base[("model", "layers", "0", "mlp", "down_proj", "weight")]
    assert down.parts["codes"].shape == (2, 128, 128)
    assert tuple(down.parts["codes"].sharding.spec) == (None, "tensor", "fsdp")
    assert tuple(down.parts["absmax"].sharding.spec) == (None, "tensor", "fsdp")
    assert tuple(down.parts["nested_absmax"].sharding.spec) == (None, None)
