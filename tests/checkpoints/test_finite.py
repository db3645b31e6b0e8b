"""NaN and infinity in weights are reported by tensor and file, wherever weights are read."""

import json
import os
import shutil
import subprocess
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_gguf import write_tiny
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.adapters import method_from_config
from jaxtune.checkpoints.finite import check_finite, count_not_finite
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.checkpoints.load_model import load_model
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.mesh import single_device_mesh

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
FLOATS = [
    np.dtype(kind)
    for kind in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        np.float16,
        ml_dtypes.bfloat16,
        np.float32,
        np.float64,
    )
]


def bits(dtype):
    """Returns an array of every bit pattern of up to 16 bits, or of many others."""
    if dtype.itemsize <= 2:
        return np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
    limits = [np.finfo(other).max for other in (np.float16, np.float32, dtype)]
    near = [65519, 65520, 3.3895e38, 3.3961776e38, 3.4028235e38, 3.40282357e38, 5e-324, 0, np.inf]
    near = np.array([*limits, *near, np.nan], dtype)
    near = np.concatenate([near, np.nextafter(near, 0), np.nextafter(near, np.inf)])
    random = np.random.default_rng(0).integers(0, 256, 4000 * dtype.itemsize, np.uint8)
    return np.concatenate([near, -near, random.view(dtype)])


@pytest.mark.parametrize("target", FLOATS[2:], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_values_found_are_those_that_numpy_finds(dtype, target):
    with np.errstate(all="ignore"):
        values = bits(dtype)
        bad = ~np.isfinite(values.astype(target).astype(np.float64))

    def is_found(value):
        try:
            check_finite(value, "name", "file", target)
        except JaxtuneError:
            return True
        return False

    assert [is_found(value) for value in values.reshape(-1, 1)] == bad.tolist()
    assert count_not_finite(values, target) == bad.sum()
    check_finite(values[~bad].reshape(-1), "name", "file", target)  # in chunks


def poisoned(directory, out, changes):
    """Copies a checkpoint of one file; `changes` maps tensors to their new values at the start."""
    shutil.copytree(directory, out)
    path = next(out.glob("*model.safetensors"))
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for name, values in changes.items():
        flat = tensors[name].reshape(-1)
        flat[: len(values)] = torch.tensor(values, dtype=torch.float32).to(flat.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def refusal(call):
    with pytest.raises(JaxtuneError) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


NAN, INF = float("nan"), float("inf")
LOADS = {"plain": {}, "float32": {"dtype": "float32"}, "int8": {"quantize": "int8"}}


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", Q_PROJ])
def test_a_weight_of_the_base_is_named_while_loading(tiny, tmp_path, name, options):
    path = poisoned(tiny("llama"), tmp_path / "base", {name: [NAN, 1.0, -INF]})
    size = load_file(path)[name].numel()
    message = refusal(lambda: jaxtune.load(path.parent, progress=False, **options))
    assert message.startswith(f"{path}: {name}: 2 of {size:,} values are NaN or infinite")


def test_a_value_beyond_the_dtype_of_the_computation(tiny, tmp_path):
    path = poisoned(tiny("llama"), tmp_path / "base", {Q_PROJ: [7e4]})
    message = refusal(lambda: jaxtune.load(path.parent, dtype="float16", progress=False))
    assert message == f"{path}: {Q_PROJ}: 1 of 4,096 values is NaN or infinite in float16"
    jaxtune.load(path.parent, progress=False)


def test_only_what_is_used_is_checked(tiny, tmp_path):
    path = poisoned(tiny("llama"), tmp_path / "base", {"model.layers.2.mlp.up_proj.weight": [NAN]})
    config = json.loads((path.parent / "config.json").read_text()) | {"num_hidden_layers": 2}
    (path.parent / "config.json").write_text(json.dumps(config))
    jaxtune.load(path.parent, progress=False)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_weight_is_named_while_converting(tiny, tmp_path, quantize):
    path = poisoned(tiny("llama"), tmp_path / "base", {Q_PROJ: [INF]})
    message = refusal(lambda: jaxtune.convert(path.parent, tmp_path / "out", quantize))
    assert message.startswith(f"{path}: {Q_PROJ}: 1 of 4,096 values is NaN")
    assert not (tmp_path / "out").exists()


def test_a_weight_is_named_before_pissa_decomposes_it(tiny, tmp_path):
    path = poisoned(tiny("llama"), tmp_path / "base", {Q_PROJ: [NAN]})
    section = resolve({"adapter": {"method": "pissa", "rank": 2, "alpha": 2}}).adapter
    message = refusal(
        lambda: load_model(
            open_source(path.parent),
            "float32",
            single_device_mesh(),
            method=method_from_config(section),
            progress=False,
        )
    )
    assert message.startswith(f"{path}: {Q_PROJ}: 1 of 4,096 values is NaN")


# Weight formats on disk, and a tensor of each that is not the codes.
STORED = {
    "nf4": "nested_absmax",
    "int4": "weight_scale",
    "int8": "SCB",
    "fp8": "weight_scale_inv",
}


@pytest.mark.parametrize("keep", [False, True], ids=["dequantized", "kept"])
@pytest.mark.parametrize("form", STORED)
def test_a_scale_of_a_quantized_weight_is_named(tiny, tmp_path, form, keep):
    directory = jaxtune.convert(tiny("llama"), tmp_path / "quantized", form, progress=False)
    names = load_file(directory / "model.safetensors")
    scale = next(n for n in names if n.startswith(Q_PROJ[:-7]) and n.endswith(STORED[form]))
    path = poisoned(directory, tmp_path / "base", {scale: [NAN]})
    options = {"quantize": form} if keep else {}
    message = refusal(lambda: jaxtune.load(path.parent, progress=False, **options))
    assert message.startswith(f"{path}: {scale}: 1 of {names[scale].numel():,} values is NaN")


def test_the_offset_of_scales_in_nf4(tiny, tmp_path):
    directory = jaxtune.convert(tiny("llama"), tmp_path / "base", "nf4", progress=False)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith(Q_PROJ) and "quant_state" in n)
    state = json.loads(bytes(tensors[name].tolist()))
    text = json.dumps(state | {"nested_offset": 1e300}).encode()
    save_file(tensors | {name: torch.tensor(list(text), dtype=torch.uint8)}, path)
    message = refusal(lambda: jaxtune.load(directory, progress=False))
    assert message == f'{path}: "{name}" has nested_offset=1e+300, not a number'


@pytest.mark.parametrize("keep", [False, True], ids=["dequantized", "kept"])
def test_a_code_of_fp8_that_is_nan(tiny, tmp_path, keep):
    directory = jaxtune.convert(tiny("llama"), tmp_path / "quantized", "fp8", progress=False)
    path = poisoned(directory, tmp_path / "base", {Q_PROJ: [NAN]})
    options = {"quantize": "fp8"} if keep else {}
    message = refusal(lambda: jaxtune.load(path.parent, progress=False, **options))
    assert message.startswith(f"{path}: {Q_PROJ}")
    assert "1 of 4,096 values is NaN or infinite" in message


def test_a_scale_of_a_gguf(tmp_path):
    path = write_tiny(tmp_path / "m.gguf", block_type=gguf.GGMLQuantizationType.Q4_0)
    blocks = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.attn_v.weight")
    blocks.data.reshape(-1)[:2] = np.array([np.nan], np.float16).view(np.uint8)
    message = refusal(lambda: jaxtune.load(path, progress=False))
    assert message.startswith(f"{path}: model.layers.1.self_attn.v_proj.weight: 32 of 131,072 val")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_tensor_of_an_adapter(tiny, adapter, tmp_path, value):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    path = poisoned(adapter, tmp_path / "adapter", {name: [value]})
    message = refusal(lambda: jaxtune.load(tiny("llama"), path.parent, progress=False))
    assert message.startswith(f"{path}: {name}: 1 of 256 values is NaN or infinite")


SHARDED = """
import sys
from pathlib import Path
from jaxtune.adapters.define import define
from jaxtune.checkpoints.huggingface import load, open_source
from jaxtune.errors import JaxtuneError
from jaxtune.parallel.mesh import MESH_AXES, make_mesh

source = open_source(Path(sys.argv[1]))
for sizes in ({"fsdp": 4}, {"fsdp": 2, "tensor": 2}):
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes)
    try:
        load(define(source.config, "float32"), source, mesh, progress=False)
    except JaxtuneError as error:
        print(error)
"""


def test_a_weight_of_a_sharded_model(tiny, tmp_path):
    path = poisoned(tiny("llama"), tmp_path / "base", {Q_PROJ: [NAN]})
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, path.parent],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [  # a value of the shard that a device holds
        f"{path}: {Q_PROJ}: 1 of 1,024 values is NaN or infinite in float32",
        f"{path}: {Q_PROJ}: 1 of 1,024 values is NaN or infinite in float32",
    ]
