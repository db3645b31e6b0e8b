"""jaxtune loads checkpoints of bitsandbytes, and transformers with bitsandbytes loads jaxtune's."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import jaxtune
from jaxtune.adapter_files.combine import plain_config
from jaxtune.adapter_files.peft import write_adapter
from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.peft_files import PREFIX
from jaxtune.checkpoints import huggingface
from jaxtune.layers.tree import flatten, layer_names
from jaxtune.quant.weight import QuantizedWeight

TOKENS = np.arange(3, 35).reshape(2, 16)
LOGITS = 2e-5  # relative to the largest; see oracles.py
# Rows are a multiple of the block size: on a CPU, bitsandbytes 0.50.2 decodes rows of 96 values
# with errors as large as the largest value.
WIDE = {"intermediate_size": 128}
EDITED = {"up_proj": (128, 64), "down_proj": (64, 128)}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SETTINGS = {
    "double": NF4 | {"bnb_4bit_use_double_quant": True},
    "single": NF4,
    "as float32": NF4 | {"bnb_4bit_quant_storage": torch.float32},
    "as bfloat16": NF4
    | {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_use_double_quant": True},
    "skipped": NF4 | {"llm_int8_skip_modules": ["lm_head", "o_proj", "model.layers.1.mlp"]},
    "with a head": NF4 | {"llm_int8_skip_modules": ["embed_tokens"]},
}


def load_theirs(directory, **options):
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map="cpu", **options
    )
    # In eval mode, bitsandbytes computes in bfloat16 on CPUs that support it. There is no dropout.
    return model.train()


def theirs_of(directory, settings):
    return load_theirs(directory, quantization_config=BitsAndBytesConfig(**settings))


def logits(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS)).logits.numpy()


def decoded_by_them(model):
    """Returns every quantized weight by name, in float32; called before any forward pass."""
    weights = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            value = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif kind == "Linear8bitLt":
            value = bnb.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        weights[name + ".weight"] = value.numpy()
    return weights


def decoded_by_us(model):
    weights = {}
    for path, leaf in flatten(model.base):
        if not isinstance(leaf, QuantizedWeight):
            continue
        values = np.asarray(jax.jit(lambda weight: weight.dequantize(jnp.float32))(leaf))
        declared = model.definition.leaves[path].declaration
        for part, name in enumerate(layer_names(path, declared)):
            weights[name] = values[np.unravel_index(part, declared.stack_shape)]
    return weights


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


def assert_close(ours, theirs):
    assert np.abs(np.asarray(ours) - theirs).max() <= LOGITS * np.abs(theirs).max()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["double", "single", "as float32", "as bfloat16"])
def test_an_nf4_checkpoint_of_bitsandbytes_is_kept_bit_for_bit(tiny, tmp_path, kind, name):
    model = theirs_of(tiny(kind, **WIDE), SETTINGS[name])
    model.save_pretrained(tmp_path / "theirs")
    ours = jaxtune.load(tmp_path / "theirs", quantize="nf4", dtype="float32", progress=False)
    assert_equal(decoded_by_us(ours), decoded_by_them(model))
    assert_close(ours.logits(TOKENS), logits(model))


@pytest.mark.parametrize("name", ["double", "skipped", "with a head"])
def test_an_nf4_checkpoint_of_bitsandbytes_is_dequantized_by_default(tiny, tmp_path, name):
    model = theirs_of(tiny("llama", **WIDE), SETTINGS[name])
    model.save_pretrained(tmp_path / "theirs")
    source = huggingface.open_source(tmp_path / "theirs")
    for weight, value in decoded_by_them(model).items():
        assert np.array_equal(source.read(weight), value)
    ours = jaxtune.load(tmp_path / "theirs", dtype="float32", progress=False)
    assert_close(ours.logits(TOKENS), logits(model))


def test_weights_that_bitsandbytes_skipped_are_quantized_on_request(tiny, tmp_path):
    model = theirs_of(tiny("llama", **WIDE), SETTINGS["skipped"])
    model.save_pretrained(tmp_path / "theirs")
    ours = jaxtune.load(tmp_path / "theirs", quantize="nf4", dtype="float32", progress=False)
    everything = theirs_of(tiny("llama", **WIDE), SETTINGS["single"])
    assert_equal(decoded_by_us(ours), decoded_by_them(everything))


def test_an_int8_checkpoint_of_bitsandbytes_is_kept_bit_for_bit(tiny, tmp_path):
    model = theirs_of(tiny("llama", **WIDE), {"load_in_8bit": True})
    model.save_pretrained(tmp_path / "theirs")
    ours = jaxtune.load(tmp_path / "theirs", quantize="int8", dtype="float32", progress=False)
    # A checkpoint that jaxtune writes in this format has bitwise the same tensors.
    ours.save_pretrained(tmp_path / "ours", quantized=True)
    one = huggingface.HuggingFaceSource(tmp_path / "theirs")
    other = huggingface.HuggingFaceSource(tmp_path / "ours")
    assert set(one.names()) == set(other.names())
    for name in one.names():
        assert one.read(name).tobytes() == other.read(name).tobytes(), name


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("double", [True, False])
def test_transformers_loads_our_nf4_checkpoint(tiny, tmp_path, kind, double):
    settings = {"format": "nf4", "double": double}
    ours = jaxtune.load(tiny(kind, **WIDE), quantize=settings, dtype="float32", progress=False)
    model = load_theirs(ours.save_pretrained(tmp_path / "ours", quantized=True))
    assert_equal(decoded_by_us(ours), decoded_by_them(model))
    assert_close(ours.logits(TOKENS), logits(model))


def test_transformers_loads_our_nf4_checkpoint_of_some_modules(tiny, tmp_path):
    settings = {"format": "nf4", "modules": ("lm_head", "self_attn.v_proj", "mlp.down_proj")}
    directory = tiny("llama", **WIDE)
    ours = jaxtune.load(directory, quantize=settings, dtype="float32", progress=False)
    model = load_theirs(ours.save_pretrained(tmp_path / "ours", quantized=True))
    assert_equal(decoded_by_us(ours), decoded_by_them(model))
    assert_close(ours.logits(TOKENS), logits(model))


def test_transformers_loads_our_nf4_checkpoint_with_a_tied_head(tiny, tmp_path):
    directory = tiny("qwen2", tie_word_embeddings=True, **WIDE)
    ours = jaxtune.load(directory, quantize="nf4", dtype="float32", progress=False)
    model = load_theirs(ours.save_pretrained(tmp_path / "ours", quantized=True))
    assert_equal(decoded_by_us(ours), decoded_by_them(model))
    assert_close(ours.logits(TOKENS), logits(model))


def test_transformers_loads_our_int8_checkpoint(tiny, tmp_path):
    jaxtune.convert(tiny("llama", **WIDE), tmp_path / "ours", "int8", "float32", progress=False)
    model = load_theirs(tmp_path / "ours")
    ours = jaxtune.load(tmp_path / "ours", quantize="int8", dtype="float32", progress=False)
    theirs = decoded_by_them(model)
    assert decoded_by_us(ours).keys() == theirs.keys()
    for name, value in decoded_by_us(ours).items():
        # bitsandbytes divides by 127; jaxtune multiplies by its inverse.
        assert np.abs(value - theirs[name]).max() <= 2**-23 * np.abs(value).max(), name
        assert np.array_equal(
            model.get_parameter(name).data.numpy(),
            huggingface.HuggingFaceSource(tmp_path / "ours").read(name),
        )


def test_fp4_is_refused_by_name(tiny, tmp_path):
    theirs_of(tiny("llama", **WIDE), NF4 | {"bnb_4bit_quant_type": "fp4"}).save_pretrained(
        tmp_path / "x"
    )
    with pytest.raises(jaxtune.JaxtuneError, match="bnb_4bit_quant_type='fp4' is not supported"):
        jaxtune.load(tmp_path / "x", progress=False)


@pytest.mark.parametrize("double", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_adapter_merged_into_nf4_equals_their_quantization(tiny, tmp_path, double):
    """Quantizing the edited float32 weights with bitsandbytes gives bitwise jaxtune's tensors."""
    settings = {"format": "nf4", "double": double}
    directory, rng = tiny("llama", **WIDE), np.random.default_rng(0)
    names = [f"model.layers.{layer}.mlp.{name}" for layer in range(3) for name in EDITED]
    tensors = {}
    for name in names:
        rows, columns = EDITED[name.rsplit(".", 1)[-1]]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = rng.normal(0, 0.2, (4, columns))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = rng.normal(0, 0.2, (rows, 4))
    stored = StoredAdapter(
        plain_config(None, list(EDITED)) | {"r": 4, "lora_alpha": 8},
        {key: value.astype(np.float32) for key, value in tensors.items()},
    )
    adapter = write_adapter(tmp_path / "adapter", stored)
    ours = jaxtune.load(directory, adapter, settings, "float32", progress=False)
    wide = huggingface.open_source(ours.save_pretrained(tmp_path / "wide", "float32"))
    bare = ours.use(None).save_pretrained(tmp_path / "base", "float32")
    base, original = huggingface.open_source(bare), huggingface.open_source(directory)
    ours.use("default")
    merged = ours.save_pretrained(tmp_path / "merged", quantized=True)
    written = huggingface.HuggingFaceSource(merged)
    for name in names:
        weight = f"{name}.weight"
        edit = wide.read(weight) - base.read(weight)
        value = torch.tensor(original.read(weight) + edit)
        packed, state = bnb.quantize_4bit(value, quant_type="nf4", compress_statistics=double)
        assert np.array_equal(written.read(f"{name}.weight"), packed.numpy()), name
        if not double:  # see test_nf4.py: on a CPU their 8-bit codes are off by one now and then
            absmax = state.absmax.numpy()
            assert np.array_equal(written.read(f"{name}.weight.absmax"), absmax), name
    assert_close(
        jaxtune.load(merged, None, "nf4", "float32", progress=False).logits(TOKENS),
        logits(load_theirs(merged)),
    )
