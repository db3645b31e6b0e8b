"""Programs compiled for TPUs without the hardware; sizes are those of the compiler."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxtune.config import resolve
from jaxtune.demos.memory_table import DEEPSEEK_7B
from jaxtune.errors import JaxtuneError
from jaxtune.layers.attention import BACKENDS, attention
from jaxtune.layers.remat import remat
from jaxtune.parallel.devices import GIB
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import MESH_AXES
from jaxtune.planning import plan
from jaxtune.planning.topology import find_topology

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_fully")]

SMALL = DEEPSEEK_7B | {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


@pytest.fixture
def planned(tmp_path):
    """Plans a run on a model of which there is nothing but config.json, and prints the plan."""

    def make(model, topology, **sections):
        (tmp_path / "config.json").write_text(json.dumps(model))
        result = plan(resolve({"model": {"path": str(tmp_path)}, **sections}), topology)
        print(result.render())
        return result

    return make


def test_a_mesh_that_no_grid_of_chips_divides_into_is_refused():
    devices = find_topology("v5p:4x4x4").devices
    sizes = dict.fromkeys(MESH_AXES, 1)
    assert make_mesh(sizes | {"fsdp": 4, "expert": 16}, devices).size == 64
    with pytest.raises(JaxtuneError, match=r"mesh\.expert=8.* do not divide into axes"):
        make_mesh(sizes | {"fsdp": 8, "expert": 8}, devices)


@pytest.mark.parametrize(
    "heads, kv_heads, dim, value_dim",
    [(32, 32, 128, 128), (32, 8, 128, 128), (9, 3, 64, 64), (16, 16, 192, 128)],
)
def test_splash_never_holds_every_score(heads, kv_heads, dim, value_dim):
    t = 4096
    sharding = SingleDeviceSharding(find_topology("v5e:1x1").devices[0])

    def loss(q, k, v, segments):
        out = BACKENDS["splash"](q, k, v, segments, segments, 0, dim**-0.5)
        return out.astype(jnp.float32).sum()

    def like(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    compiled = (
        jax.jit(jax.grad(loss, (0, 1, 2)))
        .lower(
            like(1, t, heads, dim),
            like(1, t, kv_heads, dim),
            like(1, t, kv_heads, value_dim),
            like(1, t, dtype=jnp.int32),
        )
        .compile()
    )
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(f"{heads} heads of {dim}: {temporaries / 2**20:.0f} MiB of temporaries")
    assert f"{t},{t}" not in compiled.as_text()
    assert temporaries < heads * t * t / 2  # half a byte for each score


@pytest.mark.parametrize("policy, kernels", [("full", 4), ("save_attention", 3)])
def test_saved_attention_is_not_computed_again(policy, kernels):
    sharding = SingleDeviceSharding(find_topology("v5e:1x1").devices[0])
    x = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16, sharding=sharding)
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=sharding)

    def loss(x, segments):
        def layer(x, _):
            options = {"q_segments": segments, "kv_segments": segments, "backend": "splash"}
            return jnp.tanh(attention(x, jnp.sin(x), jnp.cos(x), **options, scale=0.125)), None

        return jax.lax.scan(remat(layer, policy), x, length=3)[0].astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).lower(x, segments).compile().as_text()
    # Forward, the gradient of the queries, that of keys and values; and forward once more.
    assert text.count('custom_call_target="tpu_custom_call"') == kernels


def test_smollm2_on_one_chip(smollm2_gguf):
    result = plan(
        resolve(
            {
                "model": {"path": str(smollm2_gguf)},
                "data": {"max_length": 256},
                "training": {"batch_size": 4},
            }
        ),
        "v5e:1x1",
    )
    print(result.render())
    assert result.attention == "splash"
    assert result.fits
    assert result.total < 0.6 * GIB


def test_deepseek_7b_lora_on_one_chip(planned):
    result = planned(
        DEEPSEEK_7B,
        "v5e:1x1",
        adapter={"rank": 8},
        data={"max_length": 1024},
        training={"batch_size": 4, "remat": "full"},
    )
    assert result.fits
    assert result.total <= 15.5 * GIB


def test_a_mesh_splits_weights_batch_and_heads(planned):
    sections = {"data": {"max_length": 512}, "training": {"batch_size": 16}}
    one = planned(SMALL, "v5e:1x1", **sections)
    four = planned(SMALL, "v5e:2x2", mesh={"data": 1, "fsdp": 2, "tensor": 2}, **sections)
    assert four.mesh["fsdp"] == four.mesh["tensor"] == 2
    assert four.arguments["batch"] * 2 == one.arguments["batch"]
    assert four.arguments["base"] < one.arguments["base"] / 3
    assert four.temporaries < one.temporaries


def test_a_program_too_large_for_the_compiler_does_not_fit(planned):
    result = planned(
        SMALL | {"vocab_size": 200_000, "hidden_size": 4096},
        "v5e:1x1",
        adapter={"method": "full"},
        data={"max_length": 128},
        training={"batch_size": 1},
    )
    assert not result.fits
    assert result.total > result.capacity == 15.75 * GIB
    assert "does not fit" in result.render()


def test_a_shape_that_no_pod_has_is_an_error():
    with pytest.raises(JaxtuneError, match='topology "v5e:3x3"'):
        find_topology("v5e:3x3")


@pytest.mark.parametrize(("name", "devices"), [("v4:2x2x1", 4), ("v4:1x1x1", 1), ("v7x:2x2x1", 8)])
def test_a_generation_has_the_devices_that_jax_sees(name, devices):
    topology = find_topology(name)
    assert (topology.count, topology.name) == (devices, name)
    # Half of a v7x is a device of its own.
    assert ("two devices" in topology.note) == name.startswith("v7x")
    sharding = SingleDeviceSharding(topology.devices[0])
    whole = jax.ShapeDtypeStruct((topology.capacity_bytes + 1,), jnp.int8, sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{topology.capacity_bytes / GIB:.2f}G"):
        jax.jit(lambda x: x + 1).lower(whole).compile()
