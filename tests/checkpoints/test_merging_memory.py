"""Host memory of merging; this file is also the measured program.

``make test-merge`` merges a checkpoint of 2 GB; the suite has a smaller one of the same kind.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_memory import ITEMSIZE, MIB, SIZES, SMALL, anonymous, shapes, write_checkpoint

from jaxtune.adapters import merge
from jaxtune.adapters.define import define
from jaxtune.adapters.merge import CHUNK, row_chunks
from jaxtune.adapters.projections.dora import Dora
from jaxtune.checkpoints.source import ALL, WrappedSource
from jaxtune.layers.tree import Shared
from jaxtune.quant import Quantization
from jaxtune.quant.fp8 import Float8

pytestmark = pytest.mark.usefixtures("compiled_fully")

FULL = bool(os.environ.get("JAXTUNE_TEST_FULL"))
# 1.04e9 parameters; the largest tensor is the embedding.
LARGE = {"vocab_size": 32000, "hidden_size": 2560, "intermediate_size": 6912, "layers": 11}
MEASURED = LARGE if FULL else SIZES
LARGEST = max(int(np.prod(shape)) for _, shape in shapes(MEASURED))  # values
VALUES = sum(int(np.prod(shape)) for _, shape in shapes(MEASURED))
COPIES = 3  # of the largest tensor in float32, beyond the mapped files
# Programs that work on a few rows, and what the allocator keeps of them: it does not grow with the
# size of a weight.
ROWS = 0 if FULL else 128 * MIB
CASES = ("dora", "quantized", "full", *(("lora", "pissa", "loaded") if FULL else ()))
SHARD_BYTES = 500 * MIB
CONFIGS = Path(__file__).parents[1] / "models" / "configs"


class Merging:
    """The cases, each on a checkpoint and what a run over it has saved."""

    def __init__(self, directory, scratch):
        from jaxtune.checkpoints import huggingface

        self.source, self.scratch = huggingface.open_source(directory), scratch

    def prepare(self, case):
        """Returns a function that writes the merged checkpoint into a directory."""
        return getattr(self, f"_{case}")()

    def _adapter(self, method, form=None):
        import jax

        from jaxtune.adapters.define import define
        from jaxtune.adapters.method import Method
        from jaxtune.checkpoints.merging import merge_adapter
        from jaxtune.layers.tree import flatten, unflatten
        from jaxtune.quant import Quantization

        quantization = None if form is None else Quantization(form)
        definition = define(self.source.config, "bfloat16", method, quantization)
        trainable, constants = method.init(definition, 0)
        key = jax.random.key(0)
        moved = {
            path: 0.01 * jax.random.normal(key, value.shape) for path, value in flatten(trainable)
        }
        assert isinstance(method, Method)
        stored = method.store(definition, unflatten(moved), constants)
        return merge_adapter(self.source, "bfloat16", method, stored, quantization)

    def _convert(self, merge, quantized=False):
        from jaxtune.checkpoints import huggingface

        def write(target):
            huggingface.convert(
                target,
                merge.definition,
                merge.source,
                dtype="bfloat16",
                edits=merge.edits,
                quantized=quantized,
                original=merge.original,
                shard_bytes=SHARD_BYTES,
                progress=False,
            )

        return write

    def _lora(self):
        from jaxtune.adapters.projections.lora import Lora

        return self._convert(self._adapter(Lora(8, 8.0, targets=("all-linear", "lm_head"))))

    def _dora(self):
        from jaxtune.adapters.projections.dora import Dora

        return self._convert(self._adapter(Dora(8, 8.0, targets=("all-linear", "lm_head"))))

    def _pissa(self):
        from jaxtune.adapters.projections.pissa import Pissa

        return self._convert(self._adapter(Pissa(8, 8.0, targets=("all-linear",))))

    def _quantized(self):
        from jaxtune.adapters.projections.lora import Lora
        from jaxtune.quant.nf4 import NormalFloat4

        merge = self._adapter(Lora(8, 8.0, targets=("all-linear",)), NormalFloat4())
        return self._convert(merge, quantized=True)

    def _full(self):
        """The run's arrays are the checkpoint's, saved as a run does."""
        from jaxtune.adapters.define import define
        from jaxtune.adapters.full import Full
        from jaxtune.checkpoints.merging import merge_trained
        from jaxtune.runs.checkpoints import Checkpoints

        definition = define(self.source.config, "bfloat16", Full())
        like = definition.abstract("trainable")
        with Checkpoints(self.scratch / "state") as checkpoints:
            opened = checkpoints.open_part(1, "trainable", like)
        return self._convert(merge_trained(self.source, definition, opened))

    def _loaded(self):
        """A quantized model in memory, which is saved with its adapter."""
        import jax.numpy as jnp

        from jaxtune.adapters.merge import edits
        from jaxtune.adapters.projections.lora import Lora
        from jaxtune.checkpoints import huggingface
        from jaxtune.checkpoints.load_model import load_model
        from jaxtune.layers.tree import flatten, merge, unflatten
        from jaxtune.parallel.mesh import single_device_mesh
        from jaxtune.quant import Quantization
        from jaxtune.quant.nf4 import NormalFloat4

        options = {"method": Lora(8, 8.0, targets=("all-linear",)), "progress": False}
        options["quantization"] = Quantization(NormalFloat4())
        parts = load_model(self.source, "bfloat16", single_device_mesh(), **options)
        ones = {path: 0.01 * jnp.ones_like(value) for path, value in flatten(parts.trainable)}
        trees = parts.base, unflatten(ones), parts.constants

        def write(target):
            huggingface.save(
                target,
                parts.definition,
                merge(*trees),
                edits=edits(parts.definition.bind(*trees)),
                quantized=True,
                original=self.source,
                shard_bytes=SHARD_BYTES,
            )

        return write


def save_state(directory, scratch):
    """Saves the checkpoint's weights as a run trained in full does."""
    import jax.numpy as jnp

    from jaxtune.adapters.define import define
    from jaxtune.adapters.full import Full
    from jaxtune.checkpoints import huggingface
    from jaxtune.parallel.mesh import single_device_mesh
    from jaxtune.runs.checkpoints import Checkpoints

    source = huggingface.open_source(Path(directory))
    definition = define(source.config, "bfloat16", Full())
    tree, _ = huggingface.load(definition, source, single_device_mesh(), progress=False)
    with Checkpoints(Path(scratch) / "state") as checkpoints:
        tally = {"tally": {"best_step": None}}
        checkpoints.save(1, {"trainable": tree, "step": jnp.int32(1)}, tally)


def work(directory, scratch, *cases):
    """The measured program: prepares a case, waits for a line, writes, and says so."""
    with tempfile.TemporaryDirectory() as small:  # the runtime's own memory is none of the merge's
        path = Path(small)
        write_checkpoint(path / "from", "BF16", SMALL)
        save_state(path / "from", path)
        for case in cases:
            Merging(path / "from", path).prepare(case)(path / case)
    for case in cases:
        write = Merging(Path(directory), Path(scratch)).prepare(case)
        print("ready", flush=True)
        sys.stdin.readline()
        write(Path(scratch) / f"out-{case}")
        print("done", flush=True)
        sys.stdin.readline()
        del write


@contextlib.contextmanager
def program(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
    assert process.returncode == 0


def next_line(process, expected):
    assert process.stdout.readline() == f"{expected}\n"


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def peak(process):
    """Returns the highest anonymous memory in bytes until the next line, beyond what it is now."""
    before = highest = anonymous(process.pid)
    go_on(process)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not selector.select(0.001):
            highest = max(highest, anonymous(process.pid))
    return highest - before


@pytest.mark.slow
def test_merging_takes_three_copies_of_the_largest_tensor(tmp_path):
    directory = write_checkpoint(tmp_path / "from", "BF16", MEASURED, random=True)
    subprocess.run([sys.executable, __file__, "state", str(directory), str(tmp_path)], check=True)
    most, size = COPIES * 4 * LARGEST + ROWS, ITEMSIZE["BF16"] * VALUES
    assert most < size / 2  # or a model in memory would not show
    taken = {}
    with program("work", directory, tmp_path, *CASES) as process:
        for case in CASES:
            next_line(process, "ready")
            start = time.perf_counter()
            taken[case] = peak(process)
            seconds = time.perf_counter() - start
            next_line(process, "done")
            go_on(process)
            copies = taken[case] / (4 * LARGEST)
            print(
                f"{case}: {size / 1e9:.2f} GB in {seconds:.0f} s, {taken[case] / MIB:.0f} MiB, "
                f"{copies:.2f} × the largest tensor in float32"
            )
    assert max(taken.values()) <= most, taken


class Watched(WrappedSource):
    """A checkpoint that records the memory in use, of NumPy and of jax, at every read."""

    def __init__(self, source):
        super().__init__(source)
        self.most, self.reads = 0, 0

    def read(self, name, rows=ALL):
        arrays = sum(array.nbytes for array in jax.live_arrays())
        self.most = max(self.most, arrays + tracemalloc.get_traced_memory()[0])
        self.reads += 1
        return super().read(name, rows)


def test_a_merge_holds_one_tensor(tmp_path):
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "layers": 12}
    directory = write_checkpoint(tmp_path / "from", "BF16", sizes)
    tensors = [int(np.prod(shape)) for _, shape in shapes(sizes)]
    merging = Merging(directory, tmp_path)
    merging.source = Watched(merging.source)
    write = merging.prepare("lora")
    tracemalloc.start()
    try:
        before = sum(array.nbytes for array in jax.live_arrays())
        write(tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    most = COPIES * 4 * max(tensors) + MIB  # and what Python objects take
    assert merging.source.reads >= len(tensors)
    assert merging.source.most - before <= most < 2 * sum(tensors) / 4
    assert peak <= most


def test_no_step_of_merging_deepseek_v3_takes_three_copies_of_its_largest_tensor():
    """By the memory that the compiler assigns to each program, without weights."""
    config = json.loads((CONFIGS / "deepseek-v3.json").read_text())
    method = Dora(16, 32.0, targets=("all-linear",))
    definition = define(config, "bfloat16", method, Quantization(Float8()))
    largest = max(int(np.prod(leaf.declaration.shape)) for leaf in definition.leaves.values())
    assert largest == 129280 * 7168
    taken = {}
    for path, linear in definition.projections().items():
        leaf = definition.leaves[(*path, "weight")]
        shape = leaf.declaration.shape
        if linear.adapter is not None and shape not in taken:
            taken[shape] = merge_bytes(linear, leaf)
    taken[129280, 7168] = 4 * largest + CHUNK * 4  # as read, cast and written: two bytes each
    worst = max(taken.values())
    copies = worst / (4 * largest)
    print(f"DeepSeek-V3: {worst / 2**30:.2f} GiB, {copies:.2f} × the largest tensor in float32")
    assert len(taken) >= 8
    assert worst <= COPIES * 4 * largest
    for (rows, columns), size in taken.items():
        assert size <= COPIES * 4 * rows * columns + 16 * CHUNK * 4, (rows, columns)


def merge_bytes(linear, leaf):
    """The most that is held while a weight is merged: its values and one program."""
    rows, columns = leaf.declaration.shape
    weight = leaf.abstract()
    weight = dataclasses.replace(
        weight,
        parts={
            key: jax.ShapeDtypeStruct(part.shape, part.dtype)
            for key, part in leaf.format.parts((rows, columns)).items()
        },
    )
    graphdef, shared, own = nnx.split(linear.adapter, Shared, ...)
    lead = len(leaf.declaration.stack_shape)
    own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[lead:], a.dtype), own)
    edit = jax.eval_shape(lambda w, s: merge._edit(w, None, s, graphdef), weight, (shared, own))
    chunk = next(iter(row_chunks((rows, columns))))
    some = jax.eval_shape(lambda edit: merge._rows_of(edit, chunk), edit)
    stored = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(weight))
    part = jax.ShapeDtypeStruct((chunk.stop, columns), np.float32)
    values = 4 * rows * columns
    steps = {
        stored: merge._edit.lower(weight, None, (shared, own), graphdef),
        stored + 1: merge._decode.lower(weight, jnp.dtype("float32")),
        stored + values + values // 2: merge._edited.lower(part, some, jnp.dtype("bfloat16")),
    }
    return max(held + program_bytes(lowered) for held, lowered in steps.items())


def program_bytes(lowered):
    memory = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


if __name__ == "__main__":
    {"work": work, "state": save_state}[sys.argv[1]](*sys.argv[2:])
