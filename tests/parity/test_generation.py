"""Greedy decoding equals that of transformers; samples follow the distribution of the model."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import assert_same_logits, load_torch, random_tokens

import jaxtune
from jaxtune.generation.sampling import Sampling
from jaxtune.layers.decoder import ForwardOptions

GREEDY = Sampling()
PROMPTS = [random_tokens(i, n).tolist() for i, n in enumerate((3, 17, 1, 40, 8))]


def generate_torch(model, prompts, count, stop=None):
    """Continues each prompt greedily up to a stop token, one at a time and so without padding."""
    outputs = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        new = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        outputs.append(new[: new.index(stop)] if stop in new else new)
    return outputs


def with_eos(directory, target, token):
    """Copies a checkpoint and sets its end token; None: no end token."""
    shutil.copytree(directory, target)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((target / name).read_text())
        content["eos_token_id"] = token
        (target / name).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_greedy_tokens_are_those_of_transformers(model_type, tiny, tmp_path):
    directory = with_eos(tiny(model_type), tmp_path / "endless", None)
    expected = generate_torch(load_torch(directory), PROMPTS, 32)
    model = jaxtune.load(directory, dtype="float32", progress=False)
    assert model.generate_tokens(PROMPTS, 32, GREEDY) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)


def test_each_row_stops_at_the_end_token(tiny, tmp_path):
    directory = with_eos(tiny("llama"), tmp_path / "endless", None)
    theirs = load_torch(directory)
    end = generate_torch(theirs, PROMPTS, 32)[0][5]
    expected = generate_torch(theirs, PROMPTS, 32, stop=end)
    assert len(expected[0]) <= 5
    assert len({len(row) for row in expected}) > 1
    ours = jaxtune.load(with_eos(directory, tmp_path / "ends", end), dtype="float32")
    assert ours.generate_tokens(PROMPTS, 32, GREEDY) == expected


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_decoding_with_a_cache_gives_the_logits_of_one_pass(model_type, tiny):
    model = jaxtune.load(tiny(model_type), dtype="float32", progress=False)
    tokens = jnp.asarray(random_tokens(7, 2, 12))
    expected = np.asarray(model.logits(tokens))
    bound = model.definition.bind(model.base, model.trainable, model.constants)
    options = ForwardOptions(jnp.float32)
    segments = jnp.ones((2, 12), jnp.int32)

    @jax.jit
    def extend(part, caches, start):
        width = part.shape[1]
        place = jnp.broadcast_to(start + jnp.arange(width), part.shape)
        hidden, caches, _ = bound.decoder(
            part,
            segments[:, :width],
            place,
            options,
            caches=caches,
            kv_segment_ids=segments,
            cache_index=start,
        )
        return bound.head()(hidden), caches

    logits, caches = extend(tokens[:, :5], bound.decoder.init_cache(2, 12, jnp.float32), 0)
    parts = [logits]
    for i in range(5, 12):
        logits, caches = extend(tokens[:, i : i + 1], caches, i)
        parts.append(logits)
    assert_same_logits(np.concatenate(parts, axis=1), expected)


DRAWS = 4096


def draw(model, sampling):
    """Samples the token after a prompt `DRAWS` times; returns the share of each token, [V]."""
    drawn = model.generate_tokens([PROMPTS[0]] * DRAWS, 1, sampling)
    # The answer is empty if the sampled token is the end token.
    tokens = [row[0] if row else model.stop_ids[0] for row in drawn]
    return np.bincount(tokens, minlength=160) / DRAWS


def probabilities(model, temperature):
    logits = np.asarray(model.logits([PROMPTS[0]])[0, -1], np.float64) / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_drawn_from(shares, expected):
    """Asserts that shares [V] are within five standard errors of the expected probabilities.

    With 160 tokens, a correct program fails for one in 10,000 seeds.
    """
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    # Counts of rare tokens are not normally distributed, so a few draws more are allowed.
    assert (np.abs(shares - expected) <= 5 * error + 3 / DRAWS).all()


@pytest.fixture(scope="module")
def sampled(tiny):
    return jaxtune.load(tiny("llama", num_hidden_layers=1), dtype="float32", progress=False)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_samples_follow_the_models_probabilities(temperature, sampled):
    expected = probabilities(sampled, temperature)
    assert_drawn_from(draw(sampled, Sampling(temperature, 1.0, seed=3)), expected)


def test_top_p_samples_from_the_smallest_likely_set(sampled):
    expected = probabilities(sampled, 1.5)
    order = np.argsort(-expected)
    count = int(np.searchsorted(np.cumsum(expected[order]), 0.6)) + 1
    assert 3 < count < 100
    kept = np.zeros_like(expected)
    kept[order[:count]] = expected[order[:count]]
    shares = draw(sampled, Sampling(1.5, 0.6, seed=4))
    assert not shares[kept == 0].any()
    assert_drawn_from(shares, kept / kept.sum())


def test_a_tiny_top_p_is_greedy(sampled):
    greedy = sampled.generate_tokens(PROMPTS, 16, GREEDY)
    assert sampled.generate_tokens(PROMPTS, 16, Sampling(1.0, 1e-6, seed=5)) == greedy


def test_the_seed_decides(sampled):
    first, again, other = (
        sampled.generate_tokens(PROMPTS, 16, Sampling(1.5, 1.0, seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_equal_prompts_in_a_batch_are_sampled_independently(sampled):
    rows = sampled.generate_tokens([PROMPTS[0]] * 8, 16, Sampling(1.5, 1.0, 1))
    assert len({tuple(row) for row in rows}) > 1


@pytest.mark.slow
def test_greedy_text_of_smollm2_is_that_of_transformers(smollm2):
    model = jaxtune.load(smollm2, dtype="float32", progress=False)
    texts = [
        "The capital of France is",
        "Water boils at",
        "def fibonacci(n):\n    ",
        "Once upon a time there was a small robot who lived in a lighthouse by the sea, and",
        "1, 1, 2, 3, 5, 8,",
    ]
    prompts = [model.tokenizer(text)["input_ids"] for text in texts]
    assert len({len(prompt) for prompt in prompts}) > 3
    (stop,) = model.stop_ids
    expected = generate_torch(load_torch(smollm2), prompts, 64, stop)
    assert model.generate_tokens(prompts, 64, GREEDY) == expected
    decoded = [model.tokenizer.decode(row, skip_special_tokens=True) for row in expected]
    assert model.generate(texts, max_new_tokens=64) == decoded


def test_a_text_with_bos_is_continued_like_the_text_without(tiny_chat, tmp_path):
    """The tokenizer adds BOS, which is not repeated, and EOS, which is removed from the prompt."""
    shutil.copytree(tiny_chat, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"add_bos_token": True, "add_eos_token": True}
    path.write_text(json.dumps(settings))
    model = jaxtune.load(tmp_path / "model", dtype="float32", progress=False)
    bos, eos = model.tokenizer.bos_token, model.tokenizer.eos_token_id
    ids = model.tokenizer("hi")["input_ids"]
    assert (ids[0], ids.pop()) == (model.tokenizer.bos_token_id, eos)
    expected = model.generate_tokens([ids] * 2, 8, GREEDY)
    assert model.generate([f"{bos}hi", "hi"], 8) == [
        model.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected
    ]
    assert model.generate([f"{bos}hi", "hi"], 8) != model.generate([f"{bos}hj", "hj"], 8)
