"""Block-scaled fp8: values, rejected files, and a complete checkpoint."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.errors import JaxtuneError
from jaxtune.quant.fp8 import Float8

FP8_MAX = 448.0
# Rows and columns differ, and neither divides a size of the tiny model: a transposed block shows.
BLOCK = (20, 24)
# DeepSeek keeps these as they are: embedding, head, norms, routers.
PLAIN = ("embed_tokens", "lm_head", "norm", "mlp.gate.weight", "e_score_correction_bias")
LATENT = {
    "head_dim": 16,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 36,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
TOKENS = np.random.default_rng(0).integers(3, 160, (2, 24)).astype(np.int32)
# Float32 programs that sum in another order, over some tens of operations in a row.
LOGITS = 2e-5


def written_out(bits, scale, block):
    """The rule in float64, an element at a time: row i, column j has scale [i / rows, j / cols]."""
    values = torch.from_numpy(bits).view(torch.float8_e4m3fn).double().numpy()
    rows = np.arange(bits.shape[0])[:, None] // block[0]
    columns = np.arange(bits.shape[1])[None, :] // block[1]
    return (values * scale.astype(np.float64)[rows, columns]).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 384), (128, 128)),
        ((576, 256), (128, 128)),  # kv_a_proj_with_mqa: 5 rows of scales, the last for 64 rows
        ((256, 300), (128, 128)),
        ((129, 257), (128, 128)),
        ((1, 1), (128, 128)),
        ((70, 50), (32, 16)),
    ],
)
def test_dequantized_values_are_exact(shape, block):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 256, shape, np.uint8)  # every value there is, NaN among them
    scales = tuple(-(-size // part) for size, part in zip(shape, block, strict=True))
    scale = (rng.uniform(1, 2, scales) * 2.0 ** rng.integers(-30, 10, scales)).astype(np.float32)
    ours = Float8(block).decode({"codes": bits, "scale": scale}, shape)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, written_out(bits, scale, block))


def quantize(weight):
    """Quantizes a torch matrix block by block; returns (fp8, scales, what they stand for)."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]))
    quantized = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    restored = torch.empty_like(weight)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = np.s_[i * BLOCK[0] : (i + 1) * BLOCK[0], j * BLOCK[1] : (j + 1) * BLOCK[1]]
            scales[i, j] = weight[where].abs().max() / FP8_MAX
            quantized[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
            restored[where] = quantized[where].float() * scales[i, j]
    return quantized, scales, restored


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """A tiny V3 in fp8, and in float32 what that stands for."""
    directory = tmp_path_factory.mktemp("fp8")
    original = tiny("deepseek_v3", **LATENT)
    quantized, restored = {}, {}
    for name, value in load_file(original / "model.safetensors").items():
        if any(part in name for part in PLAIN):
            quantized[name] = restored[name] = value
            continue
        quantized[name], quantized[name + "_scale_inv"], restored[name] = quantize(value)
    config = json.loads((original / "config.json").read_text())
    for name, tensors in (("fp8", quantized), ("float32", restored)):
        (directory / name).mkdir()
        save_file(tensors, directory / name / "model.safetensors", metadata={"format": "pt"})
        (directory / name / "config.json").write_text(json.dumps(config))
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
    (directory / "fp8" / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings})
    )
    return directory


def tensors_of(directory):
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def torch_logits(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.numpy()


def test_quantizing_changed_the_model(checkpoints, tiny):
    """Or the tests below would say nothing of scales."""
    theirs, before = (
        torch_logits(checkpoints / "float32"),
        torch_logits(tiny("deepseek_v3", **LATENT)),
    )
    assert np.abs(theirs - before).max() > 100 * LOGITS * np.abs(before).max()
    names = tensors_of(checkpoints / "fp8")
    assert sum(name.endswith("_scale_inv") for name in names) == 3 * 5 + 3 + 2 * 3 + 2 * 8 * 3
    assert names["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (3, 3)


def test_logits_are_those_of_torch_on_dequantized_weights(checkpoints):
    theirs = torch_logits(checkpoints / "float32")
    ours = jaxtune.load(checkpoints / "fp8", dtype="float32", progress=False).logits(TOKENS)
    assert np.abs(np.asarray(ours) - theirs).max() <= LOGITS * np.abs(theirs).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_saved_dequantized(checkpoints, dtype, tmp_path):
    """Weights are rounded once, from float32; the correction bias of the router never is."""
    model = jaxtune.load(checkpoints / "fp8", dtype=dtype, progress=False)
    saved = model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    ours, expected = tensors_of(saved), tensors_of(checkpoints / "float32")
    assert set(ours) == set(expected)
    for name, value in expected.items():
        kept = torch.float32 if "correction_bias" in name else getattr(torch, dtype)
        assert ours[name].dtype == kept
        assert torch.equal(ours[name], value.to(kept)), name
    if dtype == "float32":
        np.testing.assert_array_equal(torch_logits(saved), torch_logits(checkpoints / "float32"))


def test_bfloat16_gives_about_the_same_logits(checkpoints):
    theirs = torch_logits(checkpoints / "float32")
    ours = jaxtune.load(checkpoints / "fp8", dtype="bfloat16", progress=False).logits(TOKENS)
    # A router may choose another expert after rounding, so single logits say little: the cosine.
    ours, theirs = np.asarray(ours, np.float64).ravel(), theirs.astype(np.float64).ravel()
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.99


WEIGHT = "model.layers.1.mlp.experts.3.up_proj.weight"


def without_scale(tensors):
    del tensors[WEIGHT + "_scale_inv"]


def scale_of_another_shape(tensors):
    tensors[WEIGHT + "_scale_inv"] = torch.ones(2, 2)


def scale_without_weight(tensors):
    del tensors[WEIGHT]


def scale_of_a_plain_weight(tensors):
    tensors[WEIGHT] = torch.ones(36, 64, dtype=torch.bfloat16)


def integer_scale(tensors):
    tensors[WEIGHT + "_scale_inv"] = torch.ones(2, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_scale, f'"{WEIGHT}" is fp8 but has no "{WEIGHT}_scale_inv"'),
        (scale_of_another_shape, f'"{WEIGHT}_scale_inv" is float32 [2, 2], not float32 [2, 3]'),
        (scale_without_weight, f'{WEIGHT} is stored as fp8 but has no "{WEIGHT}"'),
        (scale_of_a_plain_weight, f'"{WEIGHT}" is bfloat16 [36, 64], not float8_e4m3fn [36, 64]'),
        (integer_scale, f'"{WEIGHT}_scale_inv" is int32 [2, 3], not float32 [2, 3]'),
    ],
)
def test_tensors_that_do_not_match_are_one_line(checkpoints, tmp_path, spoil, message):
    shutil.copytree(checkpoints / "fp8", tmp_path / "spoilt")
    tensors = load_file(tmp_path / "spoilt" / "model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "spoilt" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(JaxtuneError) as raised:
        jaxtune.load(tmp_path / "spoilt", dtype="float32", progress=False)
    assert message in str(raised.value)
    assert str(tmp_path / "spoilt") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"fmt": "e5m2"},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, 0]},
        {"weight_block_size": [128, 10**9]},
        {"weight_block_size": ["128", "128"]},
        {"weight_block_size": 128},
        {"weight_block_size": {"rows": 128, "columns": 128}},
    ],
)
def test_settings_that_are_not_known_are_one_line(checkpoints, tmp_path, changes):
    shutil.copytree(checkpoints / "fp8", tmp_path / "spoilt")
    path = tmp_path / "spoilt" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(JaxtuneError) as raised:
        open_source(tmp_path / "spoilt")
    assert "quantization_config" in str(raised.value)
    assert next(iter(changes)) in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"quant_method": "fp9"}, 'quant_method="fp9" is unknown; did you mean "fp8"?'),
        ({"quant_method": "gptq"}, '"gptq" is unknown'),
        ("fp8", "quantization_config is 'fp8' in config.json, not an object"),
    ],
)
def test_another_method_is_named_with_what_is_known(checkpoints, tmp_path, method, message):
    shutil.copytree(checkpoints / "fp8", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = method
    path.write_text(json.dumps(config))
    with pytest.raises(JaxtuneError) as raised:
        open_source(tmp_path / "other")
    assert message in str(raised.value)
