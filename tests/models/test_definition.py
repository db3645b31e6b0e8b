import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.adapters.define import define
from jaxtune.adapters.full import Full
from jaxtune.adapters.projections.lora import Lora
from jaxtune.checkpoints import huggingface
from jaxtune.layers.tree import flatten, layer_names, unflatten
from jaxtune.models.definition import initialize
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.strict_json import read_object

CHANGES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("model_type", CHANGES)
def test_a_definition_has_the_names_and_shapes_of_transformers(tiny, model_type):
    directory = tiny(model_type, **CHANGES[model_type])
    definition = define(read_object(directory / "config.json"), "float32")
    ours = {
        name: leaf.declaration.shape
        for path, leaf in definition.in_checkpoint().items()
        for name in layer_names(path, leaf.declaration)
    }
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert ours == {name: tuple(value.shape) for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def config(tiny):
    return read_object(tiny("llama") / "config.json")


def test_only_what_is_trained_is_float32(config):
    definition = define(config, "bfloat16", Lora(rank=2, targets=("q_proj",)))
    kinds = {"base": set(), "trainable": set(), "constants": set()}
    for leaf in definition.leaves.values():
        kinds[leaf.kind].add(str(leaf.dtype))
    assert kinds == {"base": {"bfloat16"}, "trainable": {"float32"}, "constants": {"float32"}}
    assert set(definition.of_kind("trainable")) == {
        ("model", "layers", "0", "self_attn", "q_proj", "adapter", f"lora_{factor}")
        for factor in "AB"
    }


def test_full_training_leaves_no_base(config):
    definition = define(config, "bfloat16", Full())
    assert not definition.of_kind("base", "constants")
    assert set(definition.of_kind("trainable")) == set(definition.in_checkpoint())


def test_splitting_sorts_every_leaf_and_loses_none(config):
    definition = define(config, "float32", Lora(rank=2, targets=("up_proj", "lm_head")))
    whole = {}
    for kind in ("base", "trainable", "constants"):
        whole |= dict(flatten(definition.abstract(kind)))
    assert set(whole) == set(definition.leaves)
    parts = definition.split(unflatten(whole))
    for kind, tree in parts.items():
        assert set(dict(flatten(tree))) == set(definition.of_kind(kind))


def test_an_abstract_tree_has_the_sharding_of_every_array(config):
    definition, mesh = define(config, "bfloat16"), single_device_mesh()
    for path, like in flatten(definition.abstract("base", mesh)):
        leaf = definition.leaves[path]
        assert like.shape == leaf.declaration.stacked_shape
        assert like.dtype == jnp.bfloat16
        assert like.sharding.mesh == mesh


def test_random_weights_differ_from_leaf_to_leaf_and_norms_are_one(config):
    tree = dict(flatten(initialize(define(config, "float32"), jax.random.key(0), std=0.5)))
    layer = ("model", "layers", "0")
    gate, up = (
        tree[(*layer, "mlp", "gate_proj", "weight")],
        tree[(*layer, "mlp", "up_proj", "weight")],
    )
    assert not np.array_equal(gate, up)
    assert not np.array_equal(gate[0], gate[1])
    np.testing.assert_allclose(np.std(gate), 0.5, rtol=0.03)  # 18,432 draws
    assert (tree[(*layer, "input_layernorm", "weight")] == 1).all()


def test_every_number_of_the_config_has_an_effect(tiny):
    """A key that nothing reads would give the same logits, or the same shapes."""
    tokens = np.arange(24).reshape(2, 12)
    base = tiny("qwen2")

    def outcome(**changes):
        source = huggingface.HuggingFaceSource(base)
        source.config |= changes
        definition = define(source.config, "float32")
        shapes = {path: leaf.declaration for path, leaf in definition.leaves.items()}
        if shapes != reference_shapes:
            return "shapes"
        parts = huggingface.load(definition, source, single_device_mesh(), progress=False)[0]
        model.definition, model.base = definition, parts
        return np.asarray(model.logits(tokens))

    model = jaxtune.load(base, dtype="float32", progress=False)
    reference = np.asarray(model.logits(tokens))
    reference_shapes = {path: leaf.declaration for path, leaf in model.definition.leaves.items()}
    assert np.array_equal(outcome(), reference)
    for key, value in {
        "vocab_size": 161,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 0.1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }.items():
        changed = outcome(**{key: value})
        assert isinstance(changed, str) or not np.allclose(changed, reference), key
