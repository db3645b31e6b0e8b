"""Host memory of loading and saving. Run as a program, this file is the process that is measured.

Anonymous memory is what counts: pages of a mapped file can be dropped at any time.
"""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

MIB = 2**20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 6144,
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
MATRIX = CONFIG["vocab_size"] * CONFIG["hidden_size"]  # values in the largest tensor
SHARD_BYTES = 100 * MIB
# Compiled programs, the allocator's slack and Python objects: what does not grow with the weights.
SLACK = 12 * MIB


def shapes():
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], hidden)
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        for name in "qkvo":
            yield f"{prefix}.self_attn.{name}_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (ffn, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, ffn)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (CONFIG["vocab_size"], hidden)


def write_checkpoint(directory, kind):
    """Writes a sharded checkpoint of `kind` F32 or BF16, a byte pattern in place of weights."""
    directory.mkdir()
    itemsize = {"F32": 4, "BF16": 2}[kind]
    pattern = (np.arange(MATRIX, dtype=np.uint32) % 997).astype(f"<u{itemsize}")
    shards, held = [[]], 0
    for name, shape in shapes():
        size = int(np.prod(shape)) * itemsize
        if held + size > SHARD_BYTES:
            shards, held = [*shards, []], 0
        shards[-1].append((name, shape, size))
        held += size
    weight_map = {}
    for number, shard in enumerate(shards):
        header, start = {}, 0
        for name, shape, size in shard:
            offsets = [start, start + size]
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
            weight_map[name] = f"shard-{number}.safetensors"
            start += size
        text = json.dumps(header).encode()
        with (directory / f"shard-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, shape, _ in shard:
                file.write(pattern[: int(np.prod(shape))].data)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(CONFIG))


def anonymous(process="self"):
    """Returns the resident anonymous memory of a process in bytes."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) * 1024


class Measured(NamedTuple):
    peak: int
    after: int
    reads: int


def measure(*arguments):
    """Runs this file as a program; returns its bytes above where it stood before the work."""
    command = [sys.executable, __file__, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = peak = anonymous(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        import selectors

        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        while not selector.select(0.0005):
            peak = max(peak, anonymous(process.pid))
        reads = int(process.stdout.readline())
        after = anonymous(process.pid)
        process.stdin.write("end\n")
        process.stdin.flush()
        assert process.wait() == 0
    return Measured(peak - before, after - before, reads)


def program(work, source, dtype, to):
    import jax.numpy as jnp

    from jaxtune.adapters.define import define
    from jaxtune.checkpoints import huggingface
    from jaxtune.parallel.mesh import single_device_mesh

    opened = huggingface.HuggingFaceSource(Path(source))
    reads = []
    read = opened.read
    opened.read = lambda name: (reads.append(name), read(name))[1]
    definition = define(opened.config, dtype)
    mesh = single_device_mesh()
    jnp.zeros(3).block_until_ready()

    def load():
        return huggingface.load(definition, opened, mesh, progress=False)[0]

    tree = load() if work == "save" else None
    print("ready", flush=True)
    sys.stdin.readline()
    if work == "load":
        tree = load()
    else:
        huggingface.save(to, definition, tree, shard_bytes=SHARD_BYTES)
    assert len(set(reads)) == len(reads)
    print(len(reads), flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    program(*sys.argv[1:])
