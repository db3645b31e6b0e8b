"""Host memory of loading and saving. Run as a program, this file is the measured process.

Anonymous memory is what counts: pages of a mapped file can be dropped at any time.
"""

import json
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compiled_fully")

MIB = 2**20
SIZES = {"vocab_size": 6144, "hidden_size": 1536, "intermediate_size": 6144, "layers": 8}
SMALL = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "layers": 2}
LARGEST = SIZES["vocab_size"] * SIZES["hidden_size"]  # values in the largest tensor
SHARD_BYTES = 100 * MIB
ITEMSIZE = {"F32": 4, "BF16": 2, "float32": 4, "bfloat16": 2}
# Programs compiled for these shapes, and the allocator's rounding: what no weight explains.
SLACK = 12 * MIB


def config(sizes):
    return {
        "model_type": "llama",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["hidden_size"] // 128,
    }


def shapes(sizes):
    hidden, ffn, vocab = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(sizes["layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def write_checkpoint(directory, kind, sizes=SIZES, random=False):
    """Writes a sharded checkpoint of dtype `kind` that holds ones, a tensor at a time.

    With `random`, the values are random ones of a block that repeats.
    """
    directory.mkdir()
    one = {"F32": b"\0\0\x80\x3f", "BF16": b"\x80\x3f"}[kind]
    if random:
        block = np.random.default_rng(0).normal(0, 0.02, 2**20 + 1)
        one = block.astype(np.float32 if kind == "F32" else ml_dtypes.bfloat16).tobytes()
    shards, held = [[]], 0
    for name, shape in shapes(sizes):
        size = int(np.prod(shape)) * ITEMSIZE[kind]
        if held + size > SHARD_BYTES:
            shards, held = [*shards, []], 0
        shards[-1].append((name, shape, size))
        held += size
    weight_map = {}
    for number, shard in enumerate(shards):
        header, start = {}, 0
        for name, shape, size in shard:
            weight_map[name] = f"shard-{number}.safetensors"
            offsets = [start, start + size]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
            start += size
        text = json.dumps(header).encode()
        with (directory / f"shard-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, _, size in shard:
                file.write((one * -(-size // len(one)))[:size])
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config(sizes)))
    return directory


def anonymous(process):
    """Returns the resident anonymous memory of a process in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) * 1024


class Measured(NamedTuple):
    """Bytes at the highest, beyond what stood before the work; how often a tensor was read."""

    peak: int
    reads: int
    seconds: float


def measure(*arguments, program=__file__):
    """Runs this file, or another, as a program and watches its memory while it works."""
    command = [sys.executable, program, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        start = time.perf_counter()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not selector.select(0.0005):
                peak = max(peak, anonymous(process.pid))
        seconds = time.perf_counter() - start
        reads = int(process.stdout.readline())
    assert process.returncode == 0
    return Measured(peak - before, reads, seconds)


def work(what, directory, dtype, to):
    import jax.numpy as jnp

    from jaxtune.adapters.define import define
    from jaxtune.checkpoints import huggingface
    from jaxtune.parallel.mesh import single_device_mesh

    def open_and_define(path):
        source = huggingface.HuggingFaceSource(Path(path))
        # What is saved in another dtype is what the cast costs memory for.
        held = "float32" if what == "cast" else dtype
        return define(source.config, held), source, single_device_mesh()

    def save(definition, tree, target):
        written = jnp.dtype(dtype) if what == "cast" else None
        huggingface.save(target, definition, tree, dtype=written, shard_bytes=SHARD_BYTES)

    with tempfile.TemporaryDirectory() as small:  # the runtime's own memory is none of the loader's
        opened = open_and_define(write_checkpoint(Path(small) / "from", "BF16", SMALL))
        tree, _ = huggingface.load(*opened, progress=False)
        save(opened[0], tree, Path(small) / "to")

    opened = definition, source, _ = open_and_define(directory)
    reads = []
    read = source.read
    source.read = lambda name, *rows: (reads.append(name), read(name, *rows))[1]
    if what != "load":
        tree, _ = huggingface.load(*opened, progress=False)
    print("ready", flush=True)
    sys.stdin.readline()
    if what == "load":
        tree, _ = huggingface.load(*opened, progress=False)
    else:
        save(definition, tree, to)
    print(len(reads), flush=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    return {kind: write_checkpoint(directory / kind, kind) for kind in ("BF16", "F32")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_disk", "dtype"),
    [("BF16", "bfloat16"), ("F32", "bfloat16"), ("BF16", "float32"), ("F32", "float32")],
)
def test_loading_takes_two_tensors_beyond_the_model(checkpoints, on_disk, dtype):
    measured = measure("load", checkpoints[on_disk], dtype, "")
    tensors = list(shapes(SIZES))
    resident = sum(int(np.prod(shape)) for _, shape in tensors) * ITEMSIZE[dtype]
    assert measured.peak > resident  # or it measured something else
    assert measured.peak - resident <= 2 * LARGEST * ITEMSIZE[on_disk] + SLACK
    assert measured.reads == len(tensors)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["save", "cast"])
def test_saving_takes_two_tensors(checkpoints, what, tmp_path):
    """A cast needs memory for what it makes; what is written as it is held needs next to none."""
    measured = measure(what, checkpoints["BF16"], "bfloat16", tmp_path / "out")
    made = 2 * LARGEST * ITEMSIZE["bfloat16"] if what == "cast" else 0
    assert measured.peak <= made + SLACK


if __name__ == "__main__":
    work(*sys.argv[1:])
