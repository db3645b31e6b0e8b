"""Checkpoints in int4 and fp8, compared with compressed-tensors and transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import jaxtune
from jaxtune.checkpoints import huggingface
from jaxtune.checkpoints.formats.registry import WRITERS

FIXTURES = Path(__file__).parent / "fixtures" / "compressed_tensors"
TOKENS = np.arange(3, 35).reshape(2, 16)
LOGITS = 2e-5  # of the largest: two float32 programs that sum in another order; see oracles.py


@pytest.mark.parametrize("directory", sorted(FIXTURES.iterdir()), ids=lambda path: path.name)
def test_int4_is_read_and_written_as_compressed_tensors_does(directory):
    source = huggingface.open_source(directory)
    (name,) = source.names()
    decoded = load_file(directory / "decoded.safetensors")[name]
    assert np.array_equal(source.read(name), decoded)
    parts = source.read_parts(name, source.form)
    assert parts is not None
    module = name.removesuffix(".weight")
    tensors = WRITERS["int4"].tensors(
        module, source.form, decoded.shape, "bfloat16", parts.__getitem__
    )
    theirs = load_file(directory / "model.safetensors")
    assert tensors.keys() == theirs.keys()
    for key, tensor in tensors.items():
        value = tensor.make()
        assert value.dtype == theirs[key].dtype == tensor.dtype and value.shape == tensor.shape
        assert value.tobytes() == theirs[key].tobytes(), key


def test_transformers_loads_our_fp8_checkpoint(tiny, tmp_path):
    directory = tiny("qwen2", hidden_size=128, intermediate_size=256)
    ours = jaxtune.load(directory, quantize="fp8", dtype="float32", progress=False)
    ours.save_pretrained(tmp_path / "ours", quantized=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=FineGrainedFP8Config(dequantize=True),
    )
    with torch.no_grad():
        theirs = model(torch.as_tensor(TOKENS)).logits.numpy()
    assert np.abs(np.asarray(ours.logits(TOKENS)) - theirs).max() <= LOGITS * np.abs(theirs).max()
