"""Quantized checkpoints on disk: round trips bit for bit, and errors that name the tensor."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxtune
import jaxtune.config
from jaxtune.adapters.define import define
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints import quantize as quantizing
from jaxtune.checkpoints.formats import packed_source
from jaxtune.checkpoints.formats.compressed_tensors import PER_WORD
from jaxtune.cli import main
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import flatten, layer_names
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.quant import Quantization
from jaxtune.quant.fp8 import Float8
from jaxtune.quant.int4 import Int4
from jaxtune.quant.int8 import Int8
from jaxtune.quant.nf4 import NormalFloat4
from jaxtune.quant.weight import QuantizedWeight

FORMATS = [
    NormalFloat4(),
    NormalFloat4(double=False),
    Int4(),
    Int4(symmetric=False),
    Int4(group_size=0),
    Int8(),
    Float8(),
    Float8((16, 32)),
]
TOKENS = np.arange(3, 35).reshape(2, 16)
# Rows of whole blocks, of whole words and of neither; odd numbers of columns and of values.
MOE = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 23,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 21,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
}


def load(directory, quantization, dtype="float32"):
    source = huggingface.open_source(directory)
    definition = define(source.config, dtype, quantization=quantization)
    tree, _ = huggingface.load(definition, source, single_device_mesh(), progress=False)
    return definition, tree


def assert_same(tree, other):
    leaves, others = dict(flatten(tree)), dict(flatten(other))
    assert leaves.keys() == others.keys()
    for path, leaf in leaves.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(others[path]), path
        for ours, theirs in zip(jax.tree.leaves(leaf), jax.tree.leaves(others[path]), strict=True):
            assert ours.dtype == theirs.dtype, path
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes(), path


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_quantized_model_round_trips_bit_for_bit(tiny, tmp_path, form, monkeypatch):
    definition, tree = load(tiny("deepseek_v3", **MOE), Quantization(form), "bfloat16")
    huggingface.save(tmp_path / "q", definition, tree, quantized=True, shard_bytes=40_000)
    assert (tmp_path / "q" / "model.safetensors.index.json").is_file()
    # The checkpoint brings its own settings, whatever is asked for.
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    section = jaxtune.config.resolve({"quantize": {"format": form.name}}).quantize
    chosen = huggingface.choose_quantization(section, config)
    assert chosen.format == form
    monkeypatch.setattr(packed_source, "CHUNK", 100)  # several chunks of every weight
    again = load(tmp_path / "q", chosen, "bfloat16")[1]
    assert_same(tree, again)
    experts = [leaf for path, leaf in flatten(tree) if "experts" in path]
    assert experts and all(isinstance(leaf, QuantizedWeight) for leaf in experts)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_quantized_checkpoint_reads_as_its_dequantized_weights(tiny, tmp_path, form, monkeypatch):
    definition, tree = load(tiny("deepseek_v3", **MOE), Quantization(form))
    directory = huggingface.save(tmp_path / "q", definition, tree, quantized=True)
    source = huggingface.open_source(directory)
    monkeypatch.setattr(packed_source, "CHUNK", 100)
    for path, leaf in flatten(tree):
        if not isinstance(leaf, QuantizedWeight):
            continue
        decoded = np.asarray(jax.jit(lambda weight: weight.dequantize(jnp.float32))(leaf))
        declared = definition.leaves[path].declaration
        for part, name in enumerate(layer_names(path, declared)):
            whole = source.read(name)
            assert source.dtype(name) == np.float32 and source.shape(name) == whole.shape
            expected = decoded[np.unravel_index(part, declared.stack_shape)]
            # XLA fuses the product into the sum of codes and zero points: one rounding less.
            tolerance = 1e-6 * np.abs(expected).max() if form == Int4(symmetric=False) else 0
            assert np.abs(whole - expected).max() <= tolerance, name
            assert np.array_equal(source.read(name, slice(3, 8)), whole[3:8]), name
    wide = jaxtune.load(directory, dtype="float32", progress=False).logits(TOKENS)
    ours = jaxtune.load(directory, quantize=form.name, dtype="float32", progress=False)
    # The same products of the same float32 numbers, compiled another way.
    assert np.abs(ours.logits(TOKENS) - wide).max() <= 1e-5 * np.abs(wide).max()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_converting_writes_what_loading_and_saving_would(tiny, tmp_path, form):
    source = huggingface.open_source(tiny("deepseek_v3", **MOE))
    definition, tree = load(source.path, Quantization(form), "bfloat16")
    huggingface.save(tmp_path / "saved", definition, tree, quantized=True, shard_bytes=40_000)
    huggingface.convert(tmp_path / "converted", definition, source, shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert len(files) > 3
    assert files == sorted(path.name for path in (tmp_path / "converted").iterdir())
    for name in files:
        saved = (tmp_path / "saved" / name).read_bytes()
        assert saved == (tmp_path / "converted" / name).read_bytes(), name


def test_one_format_becomes_another_as_its_values_would(tiny, tmp_path):
    jaxtune.convert(tiny("llama"), tmp_path / "fp8", "fp8", "float32", progress=False)
    jaxtune.convert(tmp_path / "fp8", tmp_path / "nf4", "nf4", "float32", progress=False)
    jaxtune.convert(tmp_path / "fp8", tmp_path / "wide", None, "float32", progress=False)
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert "quantization_config" not in config
    direct = load(tmp_path / "nf4", Quantization(NormalFloat4()))[1]
    assert_same(direct, load(tmp_path / "wide", Quantization(NormalFloat4()))[1])


def test_the_command_line_converts(tiny, tmp_path, capsys):
    main(["convert", "--from", str(tiny("llama")), "--to", str(tmp_path / "q"), "--quantize=int8"])
    assert capsys.readouterr().out == f"written: {tmp_path / 'q'}\n"
    model = jaxtune.load(tmp_path / "q", quantize="int8", progress=False)
    again = jaxtune.load(tiny("llama"), quantize="int8", progress=False)
    assert_same(model.base, again.base)


def test_each_tensor_is_read_once_while_converting(tiny, tmp_path, monkeypatch):
    source = huggingface.open_source(tiny("llama"))
    monkeypatch.setattr(quantizing, "CHUNK", 2**30)
    read, reads = source.read, []
    monkeypatch.setattr(source, "read", lambda n, *rows: (reads.append(n), read(n, *rows))[1])
    definition = define(source.config, "bfloat16", quantization=Quantization(NormalFloat4()))
    huggingface.convert(tmp_path / "q", definition, source, progress=False)
    assert sorted(reads) == sorted(source.names())


def test_plain_modules_stay_plain_and_are_listed_for_other_tools(tiny, tmp_path):
    settings = {"format": "nf4", "modules": ("mlp.up_proj", "mlp.down_proj")}
    model = jaxtune.load(tiny("qwen2"), quantize=settings, dtype="float32", progress=False)
    model.save_pretrained(tmp_path / "q", quantized=True)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert "model.layers.1.mlp.gate_proj" in skipped and "lm_head" in skipped
    assert "model.layers.1.mlp.up_proj" not in skipped
    again = jaxtune.load(tmp_path / "q", quantize=settings, dtype="float32", progress=False)
    assert_same(model.base, again.base)
    # A weight that is stored in the format and wanted in another is dequantized.
    fewer = {"format": "nf4", "modules": ("mlp.up_proj",)}
    mixed = jaxtune.load(tmp_path / "q", quantize=fewer, dtype="float32", progress=False)
    down = mixed.base["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    stored = model.base["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    assert np.array_equal(down, jax.jit(lambda w: w.dequantize(jnp.float32))(stored))


def test_reading_a_quantized_checkpoint_as_plain_is_logged(tiny, tmp_path, caplog):
    jaxtune.convert(tiny("llama"), tmp_path / "q", "int8", progress=False)
    with caplog.at_level(logging.INFO, "jaxtune"):
        jaxtune.load(tmp_path / "q", progress=False)
        assert "is quantized (int8)" in caplog.text and "quantize.format=int8" in caplog.text
        caplog.clear()
        jaxtune.load(tmp_path / "q", quantize="int8", progress=False)
    assert "is quantized" not in caplog.text


def test_int4_words_hold_eight_codes_the_first_lowest(tiny, tmp_path):
    jaxtune.convert(tiny("llama"), tmp_path / "q", "int4", progress=False)
    source = huggingface.HuggingFaceSource(tmp_path / "q")
    plain = huggingface.open_source(tiny("llama")).read("model.layers.0.mlp.up_proj.weight")
    words = source.read("model.layers.0.mlp.up_proj.weight_packed").view(np.uint32)
    scale = source.read("model.layers.0.mlp.up_proj.weight_scale").astype(np.float32)
    assert words.shape == (plain.shape[0], plain.shape[1] // PER_WORD)
    for row, column in ((0, 0), (5, 9), (95, 63)):
        code = int(words[row, column // 8]) >> 4 * (column % 8) & 15
        assert abs((code - 8) * scale[row, 0] - plain[row, column]) <= abs(scale[row, 0])


def test_scales_of_higher_precision_are_requantized(tiny, tmp_path):
    jaxtune.convert(tiny("llama"), tmp_path / "q", "int4", "float32", progress=False)

    def widen(tensors):
        for name, value in tensors.items():
            if name.endswith("_scale"):
                tensors[name] = value.astype(np.float16)

    rewrite(tmp_path / "q", widen)
    source, name = huggingface.open_source(tmp_path / "q"), "model.layers.0.mlp.up_proj.weight"
    assert source.read_parts(name, Int4()) is None
    scale = source._source.read(name + "_scale").astype(np.float32)
    assert np.abs(source.read(name)).max() <= 8 * np.abs(scale).max()


def test_a_plain_model_is_not_written_quantized(tiny, tmp_path):
    plain = jaxtune.load(tiny("llama"), progress=False)
    with pytest.raises(JaxtuneError, match="the model has no quantized weights"):
        plain.save_pretrained(tmp_path / "q", quantized=True)
    assert not (tmp_path / "q").exists()


@dataclasses.dataclass(frozen=True)
class Unwritten(Int8):
    """A weight format that files do not have."""

    name = "unwritten"


def test_a_format_without_a_writer_is_named(tiny, tmp_path):
    definition, tree = load(tiny("llama"), Quantization(Unwritten()))
    with pytest.raises(JaxtuneError) as raised:
        huggingface.save(tmp_path / "q", definition, tree, quantized=True)
    assert "unwritten cannot be written (formats with a writer: fp8, int4, int8, nf4)" in str(
        raised.value
    )
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "q").exists()


NAME = "model.layers.1.self_attn.q_proj.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"


def rewrite(directory, change):
    """Changes the tensors of a checkpoint of one file."""
    source = huggingface.HuggingFaceSource(directory)
    tensors = {name: np.array(source.read(name)) for name in source.names()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def state(**changes):
    def change(tensors):
        content = json.loads(tensors[STATE].tobytes()) | changes
        tensors[STATE] = np.frombuffer(json.dumps(content).encode(), np.uint8)

    return change


def without(name):
    return lambda tensors: tensors.pop(name)


def replaced(name, change):
    def apply(tensors):
        tensors[name] = change(tensors[name])

    return apply


def added(name):
    return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})


def altered(table):
    return np.concatenate([table[:-1], table[-1:] + 1])


FAULTS = {
    "nf4": [
        (without(NAME + ".absmax"), f'is stored as nf4 but has no "{NAME}.absmax"'),
        (without(NAME), f'is stored as nf4 but has no "{NAME}"'),
        (without(NAME + ".nested_quant_map"), f'has no "{NAME}.nested_quant_map"'),
        (without(STATE), f'has no "{STATE}"'),
        (added(NAME + ".surplus"), f"not in the architecture: {NAME}.surplus"),
        (state(blocksize=128), f'"{STATE}" has blocksize=128, not 64'),
        (state(nested_blocksize=64), f'"{STATE}" has nested_blocksize=64, not 256'),
        (state(quant_type="fp4"), f"\"{STATE}\" has quant_type='fp4', not 'nf4'"),
        (state(shape=[64]), f'"{STATE}" has shape=[64], not two positive numbers'),
        (state(nested_offset=None), f'"{STATE}" has nested_offset=None, not a number'),
        (state(shape=[64, 128]), f'"{NAME}.absmax" is uint8 [64], not uint8 [128]'),
        (replaced(STATE, lambda _: np.uint8([123])), f'"{STATE}": invalid JSON'),
        (replaced(NAME + ".quant_map", altered), f'"{NAME}.quant_map" has 2.0 at 15, but'),
        (
            replaced(NAME + ".nested_quant_map", altered),
            "has 2.0 at 255, but this format has 1.0",
        ),
        (
            replaced(NAME, lambda codes: codes[1:]),
            f'"{NAME}" holds 2047 bytes of codes, not 2048',
        ),
    ],
    "int8": [
        (without(NAME[:-6] + "SCB"), f'is stored as int8 but has no "{NAME[:-6]}SCB"'),
        (
            replaced(NAME[:-6] + "SCB", lambda scale: scale[1:]),
            f'"{NAME[:-6]}SCB" is float32 [63], not float32 [64]',
        ),
        (
            replaced(NAME[:-6] + "weight_format", lambda order: np.full_like(order, 2)),
            f'"{NAME[:-6]}weight_format" is 2; only 0',
        ),
        (replaced(NAME, lambda codes: codes.reshape(-1)), f'"{NAME}" has shape [4096], not'),
    ],
    "int4": [
        (without(NAME + "_scale"), f'is stored as int4 but has no "{NAME}_scale"'),
        (added(NAME), f"{NAME} is stored both plain and as int4"),
        (added(NAME + "_zero_point"), f"not in the architecture: {NAME}_zero_point"),
        (
            replaced(NAME + "_packed", lambda words: words[:, 1:].copy()),
            f'"{NAME}_packed" is int32 [64, 7], not int32 [64, 8]',
        ),
        (
            replaced(NAME + "_shape", lambda shape: shape[:1]),
            f'"{NAME}_shape" is int64 [1], not int64 [2]',
        ),
        (replaced(NAME + "_shape", lambda shape: shape * 0), "is [0, 0], not two positive numbers"),
    ],
    "fp8": [
        (without(NAME + "_scale_inv"), f'"{NAME}" is fp8 but has no "{NAME}_scale_inv"'),
        (
            replaced(NAME + "_scale_inv", lambda scale: scale.astype(ml_dtypes.bfloat16)),
            f'"{NAME}_scale_inv" is bfloat16 [',
        ),
    ],
}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [(form, *fault) for form, faults in FAULTS.items() for fault in faults],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inconsistent_tensors_are_named_in_one_line(tiny, tmp_path, form, change, message):
    jaxtune.convert(tiny("llama"), tmp_path / "q", form, "float32", progress=False)
    rewrite(tmp_path / "q", change)
    with pytest.raises(JaxtuneError) as raised:
        jaxtune.load(tmp_path / "q", quantize=form, dtype="float32", progress=False)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / "q") in str(raised.value)


@pytest.mark.parametrize(
    ("form", "path", "value", "message"),
    [
        ("nf4", ["quant_method"], "gptq", 'quant_method="gptq" is unknown'),
        ("nf4", ["bnb_4bit_quant_type"], "fp4", "bnb_4bit_quant_type='fp4' is not supported"),
        ("nf4", ["load_in_4bit"], False, "has neither load_in_4bit nor load_in_8bit"),
        ("nf4", ["bnb_4bit_use_double_quant"], False, "is uint8 [96], not float32 [96]"),
        ("int4", ["format"], "dense", "format='dense' is not supported (only 'pack-quantized')"),
        ("int4", ["config_groups"], {}, "config_groups is not one group with weights"),
        (
            "int4",
            ["config_groups", "group_0", "weights", "num_bits"],
            8,
            "weights.num_bits=8 is not 4",
        ),
        (
            "int4",
            ["config_groups", "group_0", "weights", "group_size"],
            -1,
            "weights.group_size=-1 is not a positive number",
        ),
        (
            "int4",
            ["config_groups", "group_0", "weights", "group_size"],
            10**9,
            "weights.group_size=1000000000 is not a positive number up to 65536",
        ),
        ("int4", ["config_groups", "group_0", "weights", "symmetric"], False, "_zero_point"),
    ],
)
def test_settings_that_are_not_known_are_named(tiny, tmp_path, form, path, value, message):
    jaxtune.convert(tiny("llama"), tmp_path / "q", form, "float32", progress=False)
    file = tmp_path / "q" / "config.json"
    config = json.loads(file.read_text())
    place = config["quantization_config"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(JaxtuneError) as raised:
        jaxtune.load(tmp_path / "q", progress=False)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert str(tmp_path / "q") in str(raised.value)
