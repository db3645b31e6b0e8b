"""Experts on a mesh give the outputs and gradients of a single device."""

import json
import os
import subprocess
import sys
import textwrap

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jaxtune.layers.context import Context
from jaxtune.layers.experts.expert_parallel import token_spec
from jaxtune.layers.experts.moe import MoE, Routing
from jaxtune.layers.tree import bind, unflatten, variables
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.rules import MESH_AXES

B, T, HIDDEN = 4, 8, 16
module = MoE(HIDDEN, 24, Routing(8, 3), 1)
graphdef, keys = nnx.graphdef(module), iter(jax.random.split(jax.random.key(0), 9))
weights = unflatten({
    path: jax.random.normal(next(keys), v.get_value().shape) * 0.3 for path, v in variables(module)
})
x = jax.random.normal(jax.random.key(1), (B, T, HIDDEN))

def loss(x, weights):
    context = Context(x, x, jnp.ones((B, T), int), jnp.ones((B, T), int), 0, None, "xla", x.dtype)
    y = bind(graphdef, weights)(x, context)
    return jnp.sum(jnp.sin(y)), y

both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
expected, worst, splits = both(x, weights), {}, {}
for sizes in json.loads(%r):
    mesh = make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes)
    with jax.set_mesh(mesh):
        ours = jax.tree.leaves(both(x, weights))
        splits[str(sizes)] = token_spec(x.shape) is not None
    pairs = zip(ours, jax.tree.leaves(expected), strict=True)
    worst[str(sizes)] = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
print(json.dumps([worst, splits]))
"""
MESHES = [
    {"fsdp": 2, "expert": 2},
    {"expert": 4},
    {"expert": 2, "tensor": 2},
    {"data": 2, "sequence": 2},
    {"sequence": 4, "expert": 1},
]


def test_a_mesh_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM % json.dumps(MESHES))],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst, splits = json.loads(done.stdout)
    assert len(worst) == len(MESHES) and all(splits.values())
    # float32: sums of a few hundred products, in another order.
    assert max(worst.values()) < 2e-5, worst
