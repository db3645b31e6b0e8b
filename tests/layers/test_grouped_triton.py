"""The GPU kernels agree with the loop, and lower for CUDA without a GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouping import BFLOAT16, EXPERTS, IN, OUT, ours, relative, routes
from jax._src.lib.mlir import ir
from jax._src.pallas.triton import lowering as triton_lowering
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxtune.layers.experts import grouped_triton
from jaxtune.layers.experts.grouped import choose_kernel, group, grouped_linear

pytestmark = pytest.mark.usefixtures("compiled_fully")

# Both sum float32 products, of up to 200 numbers here, in different order.
SAME = 1e-6


@pytest.mark.parametrize(
    ("kind", "x_dtype", "dtype", "rows", "out", "features"),
    [
        ("random", jnp.float32, jnp.float32, 1, 136, 200),
        ("random", jnp.float32, jnp.float32, 768, 136, 200),
        ("random", jnp.bfloat16, jnp.bfloat16, 768, 136, 200),
        ("one-takes-all", jnp.bfloat16, jnp.bfloat16, 768, 128, 256),  # no block reaches beyond
        ("most-are-empty", jnp.float32, jnp.float32, 61, 128, 256),
        ("the-last-takes-all", jnp.float32, jnp.float32, 61, 136, 200),
        ("the-first-is-empty", jnp.bfloat16, jnp.bfloat16, 61, 136, 200),
        ("random", jnp.bfloat16, jnp.float32, 300, 136, 8),  # a factor of LoRA
        ("random", jnp.bfloat16, jnp.float32, 300, 8, 200),
    ],
)
def test_the_kernels_of_a_gpu_do_what_the_loop_does(
    kind, x_dtype, dtype, rows, out, features, monkeypatch
):
    monkeypatch.setattr(grouped_triton, "INTERPRET", True)  # what nothing has written is NaN
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (rows, features)).astype(x_dtype)
    weight = jax.random.normal(keys[1], (EXPERTS, out, features)).astype(dtype)
    g = jax.random.normal(keys[2], (rows, out)).astype(x_dtype).astype(jnp.float32)
    expert = jnp.asarray(routes(kind, rows))

    def results(kernel):
        y, pull = jax.vjp(lambda x, weight: ours(x, weight, expert, kernel), x, weight)
        return y, *pull(g)

    expected = jax.jit(lambda: results("loop"))()
    values = jax.jit(lambda: results("triton"))()
    for value, other in zip(values, expected, strict=True):
        assert value.dtype == other.dtype
        assert relative(value, other) <= (SAME if value.dtype == jnp.float32 else BFLOAT16)


def test_rows_that_the_kernel_of_a_gpu_has_no_tile_for_are_zero(monkeypatch):
    monkeypatch.setattr(grouped_triton, "INTERPRET", True)
    groups = group(jnp.asarray(routes("one-takes-all", 61)), EXPERTS, "triton")
    x = jnp.ones((groups.source.shape[0], IN))
    y = grouped_linear(x, jnp.ones((EXPERTS, OUT, IN)), groups, OUT)
    computed = int(groups.tiles) * groups.tile
    assert computed < y.shape[0]
    assert (np.asarray(y[:computed]) == IN).all()
    assert not np.any(y[computed:])


def triton_modules(lowered):
    """Returns the modules of Triton's language in a lowered function, each once verified."""
    modules = []

    def visit(operation):
        if "call_target_name" in operation.attributes:
            name = operation.attributes["call_target_name"].value
            if name == "__gpu$xla.gpu.triton":
                config = operation.attributes["mhlo.backend_config"]
                modules.append(config["ir"].value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir().operation.walk(visit)
    # JAX does not verify what it hands to Triton's compiler, and has no public name for it.
    with triton_lowering._new_ir_context():
        return [ir.Module.parse(module) for module in modules]


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(jnp.float32, jnp.float32), (jnp.bfloat16, jnp.bfloat16), (jnp.bfloat16, jnp.float32)],
)
@pytest.mark.parametrize(("out", "features"), [(1408, 2048), (136, 200), (8, 2048)])
def test_a_gpu_gets_one_kernel_for_each_product(dtype, weight_dtype, out, features):
    def total(x, weight, expert):
        return jnp.sum(jnp.sin(ours(x, weight, expert, "triton")))

    def kernels(arguments):
        function = jax.jit(jax.grad(total, arguments))
        h100 = AbstractDevice("NVIDIA H100", num_cores=132, platform="gpu")
        # Newer releases of jax lower for the GPU that the mesh describes.
        with use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=h100)):
            traced = function.trace(
                jax.ShapeDtypeStruct((4096, features), dtype),
                jax.ShapeDtypeStruct((64, out, features), weight_dtype),
                jax.ShapeDtypeStruct((4096,), jnp.int32),
            )
            return len(triton_modules(traced.lower(lowering_platforms=("cuda",))))

    assert kernels(0) == 2  # y and dx
    assert kernels((0, 1)) == 3  # and dw


def test_old_and_other_gpus_get_the_loop():
    assert grouped_triton.unsupported("8.0") is None
    assert grouped_triton.unsupported("12.0") is None
    assert "compute capability 7.5" in str(grouped_triton.unsupported("7.5"))
    assert "gfx942" in str(grouped_triton.unsupported("gfx942"))
    assert "None" in str(grouped_triton.unsupported(None))


def test_the_platform_and_the_mesh_choose_the_kernel(caplog):
    chosen = {name: choose_kernel(name) for name in ("cpu", "tpu", "gpu", "rocm")}
    assert chosen == {"cpu": "loop", "tpu": "pallas", "gpu": "triton", "rocm": "loop"}
    assert not caplog.records
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
        assert [choose_kernel("gpu") for _ in range(2)] == ["loop", "loop"]
    assert [record.message for record in caplog.records] == [
        "routed experts: a loop instead of the gpu kernel: the mesh has 2 devices"
    ]
