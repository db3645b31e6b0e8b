import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.layers.linear import Linear
from jaxtune.layers.norm import RMSNorm
from jaxtune.layers.tree import (
    Declaration,
    Weight,
    bind,
    declaration_of,
    flatten,
    layer_names,
    merge,
    stack,
    unflatten,
    variables,
)

TREE = {"a": {"0": {"w": 1, "b": 2}}, "c": 3}
LEAVES = {("a", "0", "w"): 1, ("a", "0", "b"): 2, ("c",): 3}


class Net(nnx.Module):
    """Blocks of one layer and of two, and a norm: what a decoder is made of."""

    def __init__(self):
        blocks = ((0, 1), (1, 2))
        self.layers = nnx.List(
            [stack(Linear(2, 3, axes=("mlp", "embed"), bias=True), *layers) for layers in blocks]
        )
        self.norm = RMSNorm(2, 1e-6)


def test_flatten_and_unflatten_are_inverse():
    assert dict(flatten(TREE)) == LEAVES
    assert unflatten(LEAVES) == TREE


def test_everything_but_a_dict_is_a_leaf():
    assert dict(flatten({"a": [1, {"b": 2}]})) == {("a",): [1, {"b": 2}]}


def test_merge_joins_below_the_top():
    assert merge({"a": {"x": 1}}, {"a": {"y": 2}}, {}, {"b": 3}) == {"a": {"x": 1, "y": 2}, "b": 3}


def test_a_module_declares_every_parameter_once_without_allocating():
    declared = {path: declaration_of(variable) for path, variable in variables(Net())}
    assert declared == {
        ("layers", "0", "weight"): Declaration((3, 2), ("mlp", "embed"), layers=(0, 1)),
        ("layers", "0", "bias"): Declaration((3,), ("mlp",), "zeros", layers=(0, 1)),
        ("layers", "1", "weight"): Declaration((3, 2), ("mlp", "embed"), layers=(1, 2)),
        ("layers", "1", "bias"): Declaration((3,), ("mlp",), "zeros", layers=(1, 2)),
        ("norm", "weight"): Declaration((2,), ("norm",), "ones"),
    }
    for _, variable in variables(Net()):
        assert isinstance(variable, Weight)
        assert isinstance(variable.get_value(), jax.ShapeDtypeStruct)
        assert variable.get_value().shape == declaration_of(variable).stacked_shape


def test_stacking_puts_the_layers_first():
    declaration = Declaration((3, 2), ("mlp", None), layers=(4, 5))
    assert declaration.stacked_shape == (5, 3, 2)
    assert declaration.stacked_axes == ("layers", "mlp", None)
    assert Declaration((3, 2), ("mlp", None)).stacked_shape == (3, 2)


@pytest.mark.parametrize(
    ("path", "layers", "names"),
    [
        ("lm_head.weight", None, ["lm_head.weight"]),
        ("model.layers.0.mlp.w", (0, 2), ["model.layers.0.mlp.w", "model.layers.1.mlp.w"]),
        ("model.layers.1.mlp.w", (3, 2), ["model.layers.3.mlp.w", "model.layers.4.mlp.w"]),
        ("model.layers.2.experts.7.w", (9, 1), ["model.layers.9.experts.7.w"]),
    ],
)
def test_layers_are_named_by_their_place_in_the_model(path, layers, names):
    assert layer_names(tuple(path.split(".")), Declaration((1,), (None,), layers=layers)) == names


def test_binding_puts_arrays_from_several_trees_into_place():
    net = Net()
    arrays = {
        path: jnp.full(declaration_of(variable).stacked_shape, float(number))
        for number, (path, variable) in enumerate(variables(net))
    }
    weights = {path: value for path, value in arrays.items() if path[-1] == "weight"}
    biases = {path: value for path, value in arrays.items() if path[-1] == "bias"}
    bound = bind(nnx.graphdef(net), unflatten(weights), unflatten(biases))
    found = {path: variable.get_value() for path, variable in variables(bound)}
    assert set(found) == set(arrays)
    for path, value in arrays.items():
        assert np.array_equal(found[path], value), path


def test_a_tree_that_lacks_a_leaf_does_not_bind():
    net = Net()
    arrays = {
        path: jnp.zeros(declaration_of(variable).stacked_shape) for path, variable in variables(net)
    }
    del arrays[("norm", "weight")]
    with pytest.raises((KeyError, ValueError)):
        bind(nnx.graphdef(net), unflatten(arrays))
