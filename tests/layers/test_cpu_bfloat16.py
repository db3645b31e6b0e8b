"""On a CPU, stacks of bfloat16 weights enter compiled functions as uint16 and are never widened."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxtune
from jaxtune.compatibility import newer_than_tested
from jaxtune.layers.cpu_bfloat16 import decode, jit, pick

pytestmark = pytest.mark.usefixtures("compiled_fully")

ROOT = Path(jaxtune.__file__).parent
LAYERS, SIZE = 24, 128


def apply(tree, x):
    def body(x, layer):
        return jnp.tanh(x @ decode(layer)["w"].astype(jnp.float32)), None

    return lax.scan(body, x, tree["model"]["layers"]["0"])[0] * tree["model"]["norm"]


@pytest.fixture(scope="module")
def tree():
    w = jax.random.normal(jax.random.key(0), (LAYERS, SIZE, SIZE)).astype(jnp.bfloat16)
    return {"model": {"layers": {"0": {"w": w}}, "norm": jnp.full(SIZE, 2, jnp.bfloat16)}}


def test_every_way_to_call_gives_the_result_of_plain_jit(tree):
    x = jnp.ones((4, SIZE))
    expected = np.asarray(jax.jit(apply)(tree, x))
    function = jit(apply)
    np.testing.assert_array_equal(function(tree, x), expected)
    np.testing.assert_array_equal(function.lower(tree, x).compile()(tree, x), expected)
    inside = jit(lambda trees, x: apply(trees[0], x))
    np.testing.assert_array_equal(inside((tree, {}), x), expected)


def test_no_float32_copy_of_a_stack_is_held(tree):
    x = jnp.ones((4, SIZE))
    stack = 4 * LAYERS * SIZE * SIZE  # bytes in float32
    plain = jax.jit(apply).lower(tree, x).compile().memory_analysis().temp_size_in_bytes
    ours = jit(apply).lower(tree, x).compile().memory_analysis().temp_size_in_bytes
    print(f"temporaries: {ours} bytes; {plain} with jax.jit")
    assert ours < stack / 4
    # jaxlib 0.12 no longer widens a stack; the oldest supported release needs the module.
    if not newer_than_tested({"jax": jax.__version__}):
        assert plain >= stack, "XLA no longer widens a stack: this module has no use any more"


def test_arguments_are_views_of_the_arrays(tree):
    seen = {}

    def remember(tree):
        seen["dtype"] = tree["model"]["layers"]["0"]["w"].dtype, tree["model"]["norm"].dtype
        return tree["model"]["layers"]["0"]["w"]

    given = jit(remember, donate_argnums=()).trace(tree)
    assert seen["dtype"] == (jnp.uint16, jnp.bfloat16)
    assert given.jaxpr.in_avals[0].dtype == jnp.uint16


def test_a_stack_is_picked_from_as_it_is():
    stack = jnp.arange(24, dtype=jnp.float32).reshape(4, 6)
    for dtype in (jnp.bfloat16, jnp.float32, jnp.int8):
        picked = pick(stack.astype(dtype), lambda a: a[jnp.array([2, 0])])
        assert picked.dtype == dtype
        np.testing.assert_array_equal(picked.astype(jnp.float32), stack[jnp.array([2, 0])])


def binds(source: str) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == "bind"
        and "definition" in ast.unparse(node)
        for node in ast.walk(ast.parse(source))
    )


def test_functions_of_a_model_are_compiled_by_cpu_bfloat16_jit():
    """A module that binds trees to a model does not compile with `jax.jit`."""
    sources = {path: path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}
    binding = {path for path, source in sources.items() if binds(source)}
    names = {path.name for path in binding}
    assert {"decoding.py", "step.py", "score_experts.py", "model.py"} <= names
    assert not [path for path in binding if "jax.jit" in sources[path]]
