"""Host memory of merging into quantized weights; this file is also the measured program."""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from test_memory import LARGEST, SHARD_BYTES, SIZES, SLACK, SMALL, measure, shapes, write_checkpoint

pytestmark = pytest.mark.usefixtures("compiled_fully")

# Of the weight in float32: as frozen, as edited, as written, and what computing each of them takes.
COPIES = 10


def work(directory, to):
    import jax.numpy as jnp

    from jaxtune.adapters.merge import edits
    from jaxtune.adapters.projections.lora import Lora
    from jaxtune.checkpoints import huggingface
    from jaxtune.checkpoints.load_model import load_model
    from jaxtune.layers.tree import flatten, merge, unflatten
    from jaxtune.parallel.mesh import single_device_mesh
    from jaxtune.quant import Quantization
    from jaxtune.quant.nf4 import NormalFloat4

    def load(path):
        source = huggingface.open_source(Path(path))
        options = {"method": Lora(8, 8.0, targets=("all-linear",)), "progress": False}
        options["quantization"] = Quantization(NormalFloat4())
        parts = load_model(source, "bfloat16", single_device_mesh(), **options)
        ones = {path: jnp.ones_like(value) for path, value in flatten(parts.trainable)}
        return source, parts._replace(trainable=unflatten(ones))

    def save(source, parts, target):
        trees = parts.base, parts.trainable, parts.constants
        huggingface.save(
            target,
            parts.definition,
            merge(*trees),
            edits=edits(parts.definition.bind(*trees)),
            quantized=True,
            original=source,
            shard_bytes=SHARD_BYTES,
        )

    with tempfile.TemporaryDirectory() as small:  # the runtime's own memory is none of the merge's
        path = Path(small)
        save(*load(write_checkpoint(path / "from", "BF16", SMALL)), path / "to")
    opened = load(directory)
    print("ready", flush=True)
    sys.stdin.readline()
    save(*opened, Path(to))
    print(0, flush=True)


@pytest.mark.slow
def test_merging_takes_some_copies_of_one_weight(tmp_path):
    measured = measure(
        write_checkpoint(tmp_path / "from", "BF16"), tmp_path / "to", program=__file__
    )
    layers = sum(int(np.prod(shape)) for name, shape in shapes(SIZES) if "layers" in name)
    most = COPIES * 4 * LARGEST + SLACK
    assert measured.peak <= most < 4 * layers / 3


if __name__ == "__main__":
    work(*sys.argv[1:])
