import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxtune
from jaxtune.adapter_files.peft import write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.merge import edits
from jaxtune.adapters.projections.lora import Factor, Lora
from jaxtune.checkpoints.formats.safetensors import read_all
from jaxtune.checkpoints.huggingface import open_source
from jaxtune.checkpoints.load_model import load_model
from jaxtune.config import resolve
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import flatten, unflatten
from jaxtune.strict_json import read_object
from jaxtune.training.setup import set_up
from jaxtune.training.state import initial_state

# Ranks that differ from layer to layer, a layer without any, and one lone layer.
MIXED = {
    "model.layers.0.self_attn.q_proj": Factor(4, 8.0),
    "model.layers.1.self_attn.q_proj": Factor(2, 6.0),
    "model.layers.0.mlp.up_proj": Factor(3, 3.0),
    "model.layers.1.mlp.up_proj": Factor(5, 1.5),
    "model.layers.2.mlp.up_proj": Factor(1, 2.0),
    "model.layers.2.mlp.down_proj": Factor(6, 6.0),
}


@pytest.fixture(scope="module")
def config(tiny):
    return read_object(tiny("llama") / "config.json")


@pytest.fixture(scope="module")
def mixed():
    return Lora(factors=tuple(MIXED.items()))


def leaves(tree):
    return {path: np.asarray(value) for path, value in flatten(tree)}


def filled(trainable, seed=0):
    """Replaces the zeros of B, but not those that pad, with random values."""
    generator = np.random.default_rng(seed)
    full = leaves(trainable)
    for path, lora_B in full.items():
        if path[-1] == "lora_B":
            kept = np.any(full[(*path[:-1], "lora_A")] != 0, axis=-1)[..., None, :]
            full[path] = np.where(kept, generator.standard_normal(lora_B.shape), 0).astype(
                np.float32
            )
    return unflatten({path: jnp.asarray(value) for path, value in full.items()})


def pads(definition):
    """Returns, by path, a mask of the values that only pad."""
    masks = {}
    for name, factor in MIXED.items():
        layer, module = int(name.split(".")[2]), name.split(".")[3:]
        path = ("model", "layers", "0", *module, "adapter")
        for which in ("lora_A", "lora_B"):
            shape = definition.leaves[(*path, which)].declaration.stacked_shape
            mask = masks.setdefault((*path, which), np.ones(shape, bool))
            index = np.s_[: factor.rank] if which == "lora_A" else np.s_[:, : factor.rank]
            mask[layer][index] = False
    return masks


class TestStart:
    def test_a_is_drawn_as_peft_draws_it_and_b_is_zero(self, config):
        method = Lora(rank=64, targets=("all-linear",))
        trainable, constants = method.init(define(config, "float32", method), 0)
        for path, value in leaves(trainable).items():
            if path[-1] == "lora_B":
                assert not value.any()
                continue
            theirs = torch.empty(64, value.shape[-1])
            torch.nn.init.kaiming_uniform_(theirs, a=5**0.5)
            bound = value.shape[-1] ** -0.5
            assert 0.99 * bound < np.abs(value).max() <= bound
            # 3 × 64 × 64 draws or more: the deviation is known to about 1 %.
            np.testing.assert_allclose(value.std(), theirs.std().item(), rtol=0.03)
            assert not np.array_equal(value[0], value[1])
        assert all((value == 0.5).all() for value in leaves(constants).values())  # 32 / 64

    def test_it_depends_on_the_seed_alone(self, config):
        def start(seed, targets):
            method = Lora(rank=4, targets=targets)
            return leaves(method.init(define(config, "float32", method), seed)[0])

        one, again = (start(0, ("q_proj", "up_proj")) for _ in range(2))
        other_seed, more = start(1, ("q_proj", "up_proj")), start(0, ("all-linear", "lm_head"))
        assert set(one) < set(more)
        for path, value in one.items():
            assert np.array_equal(value, again[path])
            assert np.array_equal(value, more[path])
            assert path[-1] == "lora_B" or not np.array_equal(value, other_seed[path])
        q_proj, up_proj = (
            one[("model", "layers", "0", *module, "adapter", "lora_A")]
            for module in (("self_attn", "q_proj"), ("mlp", "up_proj"))
        )
        assert not np.array_equal(q_proj, up_proj)

    def test_dropout_on_the_head_is_refused(self, config):
        with pytest.raises(JaxtuneError, match=r"adapter\.dropout must be 0 where .* lm_head"):
            define(config, "float32", Lora(dropout=0.1, targets=("lm_head",)))


class TestPadding:
    def test_padding_is_zero_at_the_start_and_everything_else_is_not(self, config, mixed):
        definition = define(config, "float32", mixed)
        trainable, constants = mixed.init(definition, 0)
        values = leaves(filled(trainable))
        masks = pads(definition)
        assert set(masks) == set(values)
        for path, value in values.items():
            assert np.array_equal(value == 0, masks[path]), path
        scale = leaves(constants)[
            ("model", "layers", "0", "self_attn", "q_proj", "adapter", "scale")
        ]
        assert scale.tolist() == [2.0, 3.0, 0.0]

    def test_padding_stays_exactly_zero_under_adamw_with_decay(self, tiny, config, mixed):
        settings = resolve(
            {
                "training": {"dtype": "float32", "batch_size": 2, "steps": 10, "remat": "none"},
                "data": {"max_length": 16},
                "optimizer": {"learning_rate": 0.05, "weight_decay": 0.3, "schedule": "constant"},
            }
        )
        setup = set_up(settings, config, mixed, jax.devices()[:1])
        parts = load_model(open_source(tiny("llama")), "float32", setup.mesh, method=mixed)
        tokens = np.random.default_rng(0).integers(0, 160, (2, 16), dtype=np.int32)
        batch = setup.put_batch(
            {
                "tokens": tokens,
                "targets": np.roll(tokens, -1, axis=1),
                "segment_ids": np.ones_like(tokens),
                "positions": np.tile(np.arange(16, dtype=np.int32), (2, 1)),
            }
        )
        start = filled(parts.trainable)
        before = leaves(start)
        state, step = initial_state(start, setup.optimizer, setup.like), setup.train_step()
        with jax.set_mesh(setup.mesh):
            for _ in range(10):
                state, metrics = step(state, parts.base, parts.constants, batch)
        assert np.isfinite(metrics["loss"])
        masks = pads(parts.definition)
        for path, value in leaves(state.trainable).items():
            assert not value[masks[path]].any(), path
            moved = value[~masks[path]] != before[path][~masks[path]]
            assert moved.mean() > 0.99, path


class TestStoring:
    def test_store_and_restore_are_bitwise(self, config, mixed):
        definition = define(config, "float32", mixed)
        trainable, constants = mixed.init(definition, 0)
        trainable = filled(trainable)
        stored = mixed.store(definition, trainable, constants)
        assert len(stored.tensors) == 2 * len(MIXED)
        again = method_from_peft(stored)
        restored = again.restore(define(config, "float32", again), stored)
        for before, after in zip((trainable, constants), restored, strict=True):
            before, after = leaves(before), leaves(after)
            assert set(before) == set(after)
            for path, value in before.items():
                assert value.tobytes() == after[path].tobytes(), path
        assert dict(again.factors) == MIXED

    def test_the_config_is_plain_json_with_patterns_for_what_is_uncommon(self, config, mixed):
        definition = define(config, "float32", mixed)
        stored = mixed.store(definition, *mixed.init(definition, 0))
        written = json.loads(json.dumps(stored.config))
        assert written["target_modules"] == sorted(MIXED)
        ranks = {name: written["rank_pattern"].get(name, written["r"]) for name in MIXED}
        alphas = {name: written["alpha_pattern"].get(name, written["lora_alpha"]) for name in MIXED}
        assert ranks == {name: factor.rank for name, factor in MIXED.items()}
        assert alphas == {name: factor.alpha for name, factor in MIXED.items()}

    def test_uniform_targets_are_stored_by_their_short_names(self, config):
        method = Lora(rank=4, alpha=6.0, targets=("q_proj", "mlp.up_proj"))
        definition = define(config, "float32", method)
        written = method.store(definition, *method.init(definition, 0)).config
        assert written["target_modules"] == ["q_proj", "up_proj"]
        assert (written["r"], written["lora_alpha"]) == (4, 6)
        assert not written["rank_pattern"]
        assert not written["alpha_pattern"]


@pytest.fixture(scope="module")
def model(tiny, config, mixed, tmp_path_factory):
    """The tiny llama in bfloat16 with the mixed adapter read from disk, and its factors."""
    definition = define(config, "float32", mixed)
    trainable, constants = mixed.init(definition, 0)
    adapter = tmp_path_factory.mktemp("mixed") / "adapter"
    write_adapter(adapter, mixed.store(definition, filled(trainable), constants))
    factors = read_all(adapter / "adapter_model.safetensors")
    return jaxtune.load(tiny("llama"), adapter=adapter, progress=False), factors


class TestMerging:
    @staticmethod
    def expected(base, factors, name):
        """W + (alpha / r) · B A in float64."""
        module, factor = name.removesuffix(".weight"), MIXED.get(name.removesuffix(".weight"))
        weight = base.astype(np.float64)
        if factor is None:
            return weight
        lora_A, lora_B = (
            factors[f"base_model.model.{module}.lora_{which}.weight"].astype(np.float64)
            for which in "AB"
        )
        return weight + factor.alpha / factor.rank * lora_B @ lora_A

    def test_a_bfloat16_base_gives_a_bfloat16_checkpoint(self, tiny, model, tmp_path):
        loaded, factors = model
        bases = {
            n: v.astype(jnp.bfloat16)
            for n, v in read_all(tiny("llama") / "model.safetensors").items()
        }
        merged = read_all(loaded.save_pretrained(tmp_path / "out") / "model.safetensors")
        assert set(merged) == set(bases)
        for name, value in merged.items():
            assert value.dtype == jnp.bfloat16
            if name.removesuffix(".weight") not in MIXED:
                assert value.tobytes() == bases[name].tobytes(), name
                continue
            expected = self.expected(bases[name], factors, name)
            # Rounded once: half of bfloat16's last place, and a hair for float32's sum.
            np.testing.assert_allclose(value.astype(np.float64), expected, rtol=2**-7.99, atol=1e-6)
            assert not np.array_equal(value, bases[name])

    def test_a_float32_checkpoint_of_it_is_not_rounded_to_bfloat16(self, tiny, model, tmp_path):
        loaded, factors = model
        bases = read_all(tiny("llama") / "model.safetensors")
        out = loaded.save_pretrained(tmp_path / "out", dtype="float32")
        for name, value in read_all(out / "model.safetensors").items():
            expected = self.expected(bases[name].astype(jnp.bfloat16), factors, name)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-5)

    def test_only_edited_weights_are_computed(self, model):
        loaded, _ = model
        bound = loaded.definition.bind(loaded.base, loaded.trainable, loaded.constants)
        # Layers without an adapter, such as the third one of q_proj, are not among them.
        assert {name.removesuffix(".weight") for name in edits(bound)} == set(MIXED)

    def test_merged_and_attached_give_the_same_logits(self, tiny, tmp_path):
        tokens = np.random.default_rng(0).integers(0, 160, (2, 12))
        attached = jaxtune.load(tiny("llama"), dtype="float32", progress=False)
        method = Lora(factors=tuple(MIXED.items()))
        parts = load_model(open_source(tiny("llama")), "float32", attached.mesh, method=method)
        attached.definition, attached.base = parts.definition, parts.base
        attached.trainable, attached.constants = filled(parts.trainable), parts.constants
        merged = jaxtune.load(attached.save_pretrained(tmp_path / "out"), dtype="float32")
        ours, theirs = np.asarray(merged.logits(tokens)), np.asarray(attached.logits(tokens))
        # float32 products in another order.
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
