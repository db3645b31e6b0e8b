"""Host memory of converting a checkpoint of PyTorch's files.

Run as a program, this file is the process that is measured. The largest tensor has 36 MiB; with
``JAXTUNE_TEST_VOCABULARY=349525`` (`make test-large`) it has 2 GiB.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from test_memory import SLACK, SMALL, config, measure, shapes

pytestmark = pytest.mark.usefixtures("compiled_fully")

SIZES = {
    "vocab_size": int(os.environ.get("JAXTUNE_TEST_VOCABULARY", "6144")),
    "hidden_size": 1536,
    "intermediate_size": 3072,
    "layers": 2,
}
LARGEST = SIZES["vocab_size"] * SIZES["hidden_size"] * 4  # bytes


def write_checkpoint(directory, sizes, *, transposed):
    """Writes float32 ones, the large ones as torch stores a transposed tensor if so wanted."""
    import torch

    def make(shape):
        if transposed and len(shape) == 2:
            return torch.ones(shape[::-1]).t()
        return torch.ones(shape)

    directory.mkdir()
    settings = config(sizes) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(settings))
    names = (name for name in shapes(sizes) if name[0] != "lm_head.weight")
    torch.save({name: make(shape) for name, shape in names}, directory / "pytorch_model.bin")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_converting_takes_three_tensors(tmp_path, transposed):
    source = write_checkpoint(tmp_path / "from", SIZES, transposed=transposed)
    measured = measure(source, tmp_path / "to", program=__file__)
    assert (tmp_path / "to" / "model.safetensors").stat().st_size > LARGEST / 2
    print(f"{measured.peak / LARGEST:.2f} times the largest tensor, {measured.seconds:.1f} s")
    assert measured.peak <= 3 * LARGEST + SLACK


def work(source, target):
    import jaxtune

    with tempfile.TemporaryDirectory() as small:  # the runtime's own memory is none of the loader's
        first = write_checkpoint(Path(small) / "from", SMALL, transposed=True)
        jaxtune.convert(first, Path(small) / "to", progress=False)
    print("ready", flush=True)
    sys.stdin.readline()
    jaxtune.convert(source, target, progress=False)
    print(0, flush=True)


if __name__ == "__main__":
    work(*sys.argv[1:])
