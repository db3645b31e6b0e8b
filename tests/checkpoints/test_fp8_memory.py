"""Host memory and speed of streaming a block-scaled fp8 checkpoint to bfloat16 and to 4 bits.

Run as a program, this file is the process that is measured.
"""

import ctypes
import gc
import json
import math
import struct
import sys
import time
from pathlib import Path

import pytest
from test_memory import SLACK, measure

pytestmark = pytest.mark.usefixtures("compiled_fully")

CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "n_routed_experts": 44,
    "vocab_size": 8192,
    "kv_lora_rank": 512,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
# A stack of 124 experts exceeds what is allowed even in four bits; two layers have one.
LARGE = CONFIG | {"n_routed_experts": 124, "num_hidden_layers": 3}
# Bits of 1 in each dtype of a file, and bytes of a value.
ONE = {"F8_E4M3": b"\x38", "BF16": b"\x80\x3f", "F32": b"\0\0\x80\x3f"}
PLAIN = ("embed_tokens", "lm_head", "norm", "mlp.gate")


def shapes(config):
    """Yields (name, shape) of every weight of the model, in the order of its layers."""
    from jaxtune.layers.tree import layer_names
    from jaxtune.models import build_model
    from jaxtune.models.definition import Definition

    for path, leaf in Definition(config, build_model(config), "bfloat16").in_checkpoint().items():
        for name in layer_names(path, leaf.declaration):
            yield name, leaf.declaration.shape


def tensors(config):
    """Yields (name, dtype in the file, shape), scales after their weights."""
    for name, shape in shapes(config):
        if "correction_bias" in name:
            yield name, "F32", shape
        elif any(part in name for part in PLAIN):
            yield name, "BF16", shape
        else:
            yield name, "F8_E4M3", shape
            yield name + "_scale_inv", "F32", [-(-size // 128) for size in shape]


def write_checkpoint(directory, config):
    """Writes a checkpoint that holds ones, a tensor at a time; returns its directory."""
    directory.mkdir()
    header, start = {}, 0
    for name, dtype, shape in tensors(config):
        end = start + math.prod(shape) * len(ONE[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, dtype, shape in tensors(config):
            file.write(ONE[dtype] * math.prod(shape))
    settings = {"quantization_config": SETTINGS}
    (directory / "config.json").write_text(json.dumps(config | settings))
    return directory


def work(directory, form, to=""):
    from jaxtune.adapters.define import define
    from jaxtune.checkpoints import huggingface
    from jaxtune.config import resolve
    from jaxtune.parallel.mesh import single_device_mesh

    section = resolve({"quantize": {"format": form}}).quantize

    def load(path):
        source = huggingface.open_source(path)
        reads, read = [], source.read
        source.read = lambda name, *rows: (reads.append(name), read(name, *rows))[1]
        quantization = huggingface.choose_quantization(section, source.config)
        definition = define(source.config, "bfloat16", quantization=quantization)
        tree, _ = huggingface.load(definition, source, single_device_mesh(), progress=False)
        return tree, len(reads)

    def convert(path, target):
        source = huggingface.open_source(path)
        quantization = huggingface.choose_quantization(section, source.config)
        definition = define(source.config, "bfloat16", quantization=quantization)
        huggingface.convert(target, definition, source, progress=False)
        return None, len(list(definition.in_checkpoint()))

    def go(path, target):
        return convert(path, target) if to else load(path)

    # A program is compiled for every shape and stays, a few MiB each: none of them is a weight.
    go(Path(directory), f"{to}-before")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    print("ready", flush=True)
    sys.stdin.readline()
    _tree, reads = go(Path(directory), to)
    print(reads, flush=True)


def seconds_to_read(path):
    """Returns how long it takes to read a file from one end to the other."""
    buffer, start = bytearray(2**24), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


@pytest.mark.slow
def test_streaming_takes_two_dequantized_tensors_beyond_the_model(tmp_path):
    directory = write_checkpoint(tmp_path / "fp8", CONFIG)
    sizes = [math.prod(shape) for _, shape in shapes(CONFIG)]
    largest = 4 * max(math.prod(s) for _, kind, s in tensors(CONFIG) if kind == "F8_E4M3")
    measured = measure(directory, "", program=__file__)
    file = directory / "model.safetensors"
    megabytes, plain = file.stat().st_size / 1e6, seconds_to_read(file)
    resident = 2 * sum(sizes)
    print(
        f"\n{megabytes:.0f} MB of fp8 to bfloat16: {megabytes / measured.seconds:.0f} MB/s; plain "
        f"reading: {megabytes / plain:.0f} MB/s; {(measured.peak - resident) / 2**20:.0f} MiB "
        f"beyond the model's {resident / 2**20:.0f}, the largest tensor {largest / 2**20:.0f}"
    )
    assert megabytes > 650
    assert measured.reads == len(sizes)
    assert measured.peak > resident  # or it measured something else
    assert measured.peak - resident <= 2 * largest + SLACK


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int4", "fp8"])
def test_quantizing_takes_two_tensors_of_the_file_beyond_the_quantized_model(tmp_path, form):
    from jaxtune.adapters.define import define
    from jaxtune.config import resolve
    from jaxtune.quant import quantization_from_config

    directory = write_checkpoint(tmp_path / "fp8", LARGE)
    largest = max(math.prod(shape) * len(ONE[kind]) for _, kind, shape in tensors(LARGE))
    measured = measure(directory, form, program=__file__)
    file = directory / "model.safetensors"
    megabytes, plain = file.stat().st_size / 1e6, seconds_to_read(file)
    quantization = quantization_from_config(resolve({"quantize": {"format": form}}).quantize)
    definition = define(LARGE, "bfloat16", quantization=quantization)
    resident = sum(leaf.nbytes for leaf in definition.leaves.values())
    print(
        f"\n{megabytes:.0f} MB of fp8 to {form}: {megabytes / measured.seconds:.0f} MB/s; plain "
        f"reading: {megabytes / plain:.0f} MB/s; {(measured.peak - resident) / 2**20:.0f} MiB "
        f"beyond the model's {resident / 2**20:.0f}, the largest tensor {largest / 2**20:.0f}"
    )
    assert megabytes > 1250
    assert measured.peak > resident  # or it measured something else
    assert measured.peak - resident <= 2 * largest + SLACK


@pytest.mark.slow
def test_converting_takes_two_tensors_of_the_file_and_no_model(tmp_path):
    directory = write_checkpoint(tmp_path / "fp8", LARGE)
    largest = max(math.prod(shape) * len(ONE[kind]) for _, kind, shape in tensors(LARGE))
    measured = measure(directory, "nf4", tmp_path / "nf4", program=__file__)
    megabytes = (directory / "model.safetensors").stat().st_size / 1e6
    written = sum(path.stat().st_size for path in (tmp_path / "nf4").iterdir()) / 1e6
    print(
        f"\n{megabytes:.0f} MB of fp8 to {written:.0f} MB of nf4 on disk: "
        f"{megabytes / measured.seconds:.0f} MB/s; {measured.peak / 2**20:.0f} MiB, the largest "
        f"tensor {largest / 2**20:.0f}"
    )
    assert written > megabytes / 2
    assert measured.peak <= 2 * largest + SLACK


if __name__ == "__main__":
    work(*sys.argv[1:])
