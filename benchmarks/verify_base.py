"""Measures the checks of a base model: before it is read, and while it is read.

    python benchmarks/verify_base.py [--gigabytes 14] [--megabytes 600] [--rounds 5]

First, names, sizes, headers and small files of a checkpoint are compared with a record. It is a
sparse file, because no weight is read. Second, a checkpoint is loaded with and without hashing its
blocks, and its bytes are only copied out of the memory maps. Both variants alternate in one
process, so that changes in the speed of the machine affect both, and the best time of each is used.
On a busy machine only the CPU time of all threads says something. Requires `make install`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import struct
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxtune.checkpoints.blocks import BLOCK
from jaxtune.checkpoints.load_model import load_model
from jaxtune.checkpoints.open_model import open_model
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.runs.inventory import Inventory, file_differences


def write_checkpoint(directory: Path, size: float, shards: int, sparse: bool) -> Path:
    """Writes a LLaMA in bfloat16 of about `size` bytes, with random weights or as sparse files."""
    hidden, wide, vocab = (4096, 11008, 32000) if sparse else (1024, 4096, 8000)
    layer = {f"self_attn.{name}_proj.weight": (hidden, hidden) for name in ("q", "k", "v", "o")} | {
        f"mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")
    }
    layer |= {"mlp.down_proj.weight": (hidden, wide)}
    layer |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    each = 2 * sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(round((size - 4 * vocab * hidden) / each), 1)
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names, where, draw = list(shapes), {}, np.random.default_rng(0)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        end, header = 0, {}
        for name in names[shard::shards]:
            start, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {
                "dtype": "BF16",
                "shape": shapes[name],
                "data_offsets": [start, end],
            }
            where[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            if sparse:
                out.truncate(8 + len(text) + end)
            else:  # finite: the exponent of no value has all bits set
                for start in range(0, end, BLOCK):
                    count = min(BLOCK, end - start) // 2
                    out.write((draw.integers(0, 2**16, count, np.uint16) & 0xBFFF).tobytes())
    index = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def compare(directory: Path) -> float:
    """Returns the seconds that the checks before reading take, with the opening of the files."""
    inventory = Inventory(open_model(directory))
    sizes = inventory.sizes
    hashes = {name: ["0" * 32] * -(-size // BLOCK) for name, size in sizes.items()}
    record = inventory.record(str(directory), "", hashes)
    begin = time.perf_counter()
    file_differences(directory, record)
    assert not Inventory(open_model(directory)).differences(record)
    return time.perf_counter() - begin


def clocks() -> np.ndarray:
    """Returns the wall-clock time and the CPU time of all threads in seconds."""
    return np.array([time.perf_counter(), time.process_time()])


def load(directory: Path, hashing: bool) -> np.ndarray:
    """Returns the `clocks` that loading takes onto one device, from the page cache."""
    model = open_model(directory)
    begin = clocks()
    with Inventory(model).hashing() if hashing else contextlib.nullcontext() as hashes:
        mesh = single_device_mesh()
        jax.block_until_ready(load_model(model.source, "bfloat16", mesh, progress=False).base)
        if hashes is not None:
            hashes.complete()
    return clocks() - begin


def read(directory: Path, hashing: bool, cold: bool) -> np.ndarray:
    """Returns the `clocks` in which all tensors are copied out of the memory maps.

    Args:
      directory: the checkpoint.
      hashing: whether its blocks are hashed meanwhile.
      cold: whether the files are read from the disk, rather than from the page cache.
    """
    if cold:
        for path in directory.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    model = open_model(directory)
    names = model.source.names()
    target = np.empty(max(model.source.read(name).nbytes for name in names), np.uint8)
    begin = clocks()
    with Inventory(model).hashing() if hashing else contextlib.nullcontext() as hashes:
        for name in names:
            value = model.source.read(name).reshape(-1).view(np.uint8)
            np.copyto(target[: value.size], value)
        if hashes is not None:
            hashes.complete()
    return clocks() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=14)
    parser.add_argument("--megabytes", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxtune-verify-") as temporary:
        place = Path(temporary)
        sparse = write_checkpoint(place / "sparse", arguments.gigabytes * 1e9, 4, sparse=True)
        size = sum(path.stat().st_size for path in sparse.iterdir())
        print(f"comparing {size / 1e9:.1f} GB before reading: {compare(sparse):.3f} s")
        full = write_checkpoint(place / "full", arguments.megabytes * 1e6, 2, sparse=False)
        os.sync()
        size = sum(path.stat().st_size for path in full.iterdir())
        load(full, hashing=False)  # compiles
        kinds = {
            "loading": load,
            "reading from the disk": functools.partial(read, cold=True),
            "reading from memory": functools.partial(read, cold=False),
        }
        for name, measure in kinds.items():
            best = {hashing: np.full(2, np.inf) for hashing in (False, True)}
            for _ in range(arguments.rounds):
                for hashing in best:
                    best[hashing] = np.minimum(best[hashing], measure(full, hashing=hashing))
            for clock, plain, hashed in zip(("time", "CPU"), *best.values(), strict=True):
                print(
                    f"{name}, {size / 1e6:.0f} MB: {clock} {plain:.3f} s, with hashing "
                    f"{hashed:.3f} s ({hashed / plain - 1:+.1%})"
                )


if __name__ == "__main__":
    main()
