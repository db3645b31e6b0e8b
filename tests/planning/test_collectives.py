"""Collectives counted in compiled programs with known communication."""

# ruff: noqa: E501 (a compiler's lines are as long as they are)

import json
import os
import subprocess
import sys
import textwrap

import pytest

from jaxtune.planning.collectives import collectives, totals_by_kind

pytestmark = pytest.mark.usefixtures("compiled_fully")

PROGRAM = """
import jax, jax.numpy as jnp, json
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtune.planning.collectives import totals_by_kind, collectives

mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def body(x):
    def layer(c, _):
        c = c + lax.psum(c, "b")                      # 1
        whole = lax.all_gather(c, "b", tiled=True)    # 2
        c = lax.psum_scatter(whole, "b", tiled=True)  # 3
        return lax.ppermute(c, "a", [(0, 1), (1, 0)]), None
    return lax.scan(layer, x, length=6)[0]

f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("b"), out_specs=P("b"), check_vma=False))
text = f.lower(jax.ShapeDtypeStruct((4 * 256,), jnp.float32)).compile().as_text()
print(json.dumps(totals_by_kind(collectives(text, 8))))
"""


def test_collectives_in_loops_are_counted_per_trip():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "8",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    shard = 256 * 4
    assert json.loads(done.stdout) == {
        "all-reduce": {"count": 6, "bytes": 6 * 2 * shard * 3 // 4},
        "all-gather": {"count": 6, "bytes": 6 * 3 * shard},
        "reduce-scatter": {"count": 6, "bytes": 6 * 3 * shard},
        "collective-permute": {"count": 6, "bytes": 6 * shard},
    }


# What a TPU's compiler writes: no trip count but a condition, one gather in several fusions, a
# scatter that is a sum with a slice, asynchronous pairs.
TPU = textwrap.dedent(
    """\
    HloModule step

    %condition (p: (s32[], bf16[4,8])) -> pred[] {
      %limit = s32[]{:T(128)} constant(30)
      %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%p), index=0
      ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
    }

    %fused.1 (a: bf16[1,8]) -> bf16[4,8] {
      ROOT %g.1 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
    }

    %fused.2 (a: bf16[1,8]) -> bf16[4,8] {
      ROOT %g.2 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%a), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
    }

    %all-reduce-scatter.3 (a: f32[64]) -> f32[8] {
      %sum = f32[64]{0:T(128)} all-reduce(%a), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
      ROOT %part = f32[8]{0:T(128)} dynamic-slice(%sum, %at), dynamic_slice_sizes={8}
    }

    %begin.4 (a: bf16[16,8]) -> (bf16[16,8], bf16[32,8]) {
      %g.4 = bf16[32,8]{1,0} all-gather(%a), channel_id=8, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="2"}
      ROOT %c.4 = (bf16[16,8]{1,0}, bf16[32,8]{1,0}) custom-call(%g.4), custom_call_target="AsyncCollectiveStart"
    }

    %beside.5 (a: bf16[16,8]) -> bf16[32,8] {
      ROOT %g.5 = bf16[32,8]{1,0} all-gather(%a), channel_id=8, replica_groups=[4,2]<=[8], dimensions={0}, frontend_attributes={chain_id="2"}
    }

    %body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %f.0 = bf16[32,8]{1,0} fusion(%x), kind=kOutput, calls=%beside.5
      %f.1 = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
      %f.2 = bf16[4,8]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
      %f.3 = f32[8]{0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
      ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%i, %f.2)
    }

    ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
      %s = (u8[1,16]{1,0}, u8[2,16]{1,0}, u32[]{:S(2)}) all-gather-start(%c), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}
      %r = ((f32[64]{0}), f32[8]{0}) reduce-scatter-start(%e), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
      %d = u8[2,16]{1,0} all-gather-done(%s)
      %f.4 = (bf16[16,8]{1,0}, bf16[32,8]{1,0}) fusion(%x), kind=kCustom, calls=%begin.4
      ROOT %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body
    }
    """
)


def test_the_text_of_the_tpu_compiler_is_parsed():
    found = collectives(TPU, 8)
    assert {(c.kind, c.dtype, c.times, c.sent, c.group) for c in found} == {
        ("all-gather", "u8", 1, 16, 2),
        ("all-gather", "bf16", 30, 48, 4),
        ("all-gather", "bf16", 1, 256, 2),  # begun before the loop that hides it
        ("reduce-scatter", "f32", 1, 8 * 4 * 7, 8),
        ("reduce-scatter", "f32", 30, 8 * 4 * 7, 8),
    }
    assert totals_by_kind(found)["all-gather"] == {"count": 32, "bytes": 16 + 30 * 48 + 256}


@pytest.mark.parametrize("line", ["", "no computation at all", "ENTRY %main () -> f32[] {"])
def test_a_program_without_collectives_has_none(line):
    assert collectives(line, 4) == []
