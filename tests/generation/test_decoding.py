"""Chunks of decoding: no compilation for other lengths and settings, rows on their own, memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtune
from jaxtune.errors import JaxtuneError
from jaxtune.generation import decoding
from jaxtune.generation.generate import Generation, bucket
from jaxtune.generation.sampling import Sampling, choose

GREEDY = Sampling()
# Logits of a row in another batch differ by the order of float32 sums.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def model(tiny):
    """A model whose answers only their limits end."""
    loaded = jaxtune.load(
        tiny("llama", num_hidden_layers=2, max_position_embeddings=512),
        dtype="float32",
        progress=False,
    )
    loaded.__dict__["stop_ids"] = ()
    return loaded


def prompts(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(3, 160, length).tolist() for length in lengths]


def start(model, given, limit, sampling=GREEDY, **options):
    return Generation(
        model.definition,
        (model.base, model.trainable, model.constants),
        given,
        model.options,
        **{"stop": (), "mesh": model.mesh} | options,
        max_new_tokens=limit,
        sampling=sampling,
    )


def test_buckets():
    assert [bucket(n, 1) for n in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, 16]
    assert [bucket(n, 32, 4) for n in (1, 32, 33, 129, 256, 257, 1025)] == [
        *(32, 32, 64, 160, 256, 320, 1280)
    ]
    assert [bucket(n, 128, 2) for n in (1, 129, 257, 513, 1025)] == [128, 256, 384, 768, 1536]
    for steps in (1, 2, 4):
        sizes = [bucket(n, 32, steps) for n in range(1, 3000)]
        assert all(n <= size for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
        assert len(set(sizes)) <= 12 * steps


def test_other_lengths_limits_and_settings_compile_nothing(model, caplog):
    """A second turn of a chat, within the same buckets."""
    start(model, prompts(5, 20, 9), 40, stop=(2,)).complete()
    others = [
        (prompts(31, 1, 7, seed=1), 33, GREEDY, (3, 4)),
        (prompts(8, 8, 8, 8), [1, 2, 60, 4], Sampling(0.8), ()),
        (prompts(8, 8, 8), 90, Sampling(1.3, 0.7, 5, 20), ()),
    ]
    caplog.clear()
    with jax.log_compiles():
        for given, limit, sampling, stop in others:
            start(model, given, limit, sampling, stop=stop).complete()
        within = [line for line in caplog.messages if "Compiling" in line or "XLA" in line]
        start(model, prompts(33, 3, 3), 1).complete()  # another width
    assert within == []
    assert any("prefill" in line for line in caplog.messages)


def test_a_cache_that_grows_gives_the_tokens_of_one_pass(model):
    """The tokens up to index 300 are those with the largest logits given all tokens before them."""
    given = prompts(40, 9)
    answers = start(model, given, [260, 230]).complete()
    assert [len(answer.tokens) for answer in answers] == [260, 230]
    for prompt, answer in zip(given, answers, strict=True):
        logits = np.asarray(model.logits([prompt + answer.tokens])[0])[len(prompt) - 1 : -1]
        assert logits.argmax(axis=-1).tolist() == answer.tokens
        expected = jax.nn.log_softmax(jnp.asarray(logits))[np.arange(len(logits)), answer.tokens]
        np.testing.assert_allclose(answer.log_probs, expected, atol=20 * ROUNDING)


def test_rows_have_limits_and_neighbours_of_their_own(model):
    given, limits = prompts(3, 50, 17), [5, 1, 40]
    together = start(model, given, limits).complete()
    assert [len(answer.tokens) for answer in together] == limits
    for prompt, limit, answer in zip(given, limits, together, strict=True):
        (alone,) = start(model, [prompt], limit).complete()
        assert alone.tokens == answer.tokens
        np.testing.assert_allclose(alone.log_probs, answer.log_probs, atol=20 * ROUNDING)


def test_samples_depend_on_neither_chunks_nor_other_rows(model):
    given, sampling = prompts(6, 11, 4, 8, 8), Sampling(1.2, 0.9, seed=7, top_k=50)
    together = start(model, given, 24, sampling).complete()
    small = start(model, given, 24, sampling, largest_chunk=3).complete()
    first = start(model, given[:2], 24, sampling).complete()
    assert [answer.tokens for answer in small] == [answer.tokens for answer in together]
    assert [answer.tokens for answer in first] == [answer.tokens for answer in together[:2]]
    again = start(model, [given[0]] * 2, 24, sampling).complete()
    assert again[0].tokens == together[0].tokens != again[1].tokens


def test_chunks_begin_small_and_rows_end_when_told(model):
    generation = start(model, prompts(5, 9), 60)
    counts = []
    for chunk in generation:
        counts.append([len(answer.tokens) for answer in chunk])
        if len(counts) == 3:
            generation.end(0)
    assert counts[:3] == [[1, 1], [2, 2], [4, 4]]
    assert all(row == 0 for row, _ in counts[3:]) and sum(row for _, row in counts) == 60
    assert generation.finished.all() and list(generation) == []


def test_the_end_token_has_a_probability_but_is_no_part_of_the_answer(model):
    (free,) = start(model, prompts(5), 20).complete()
    end = free.tokens[9]
    index = free.tokens.index(end)
    (ended,) = start(model, prompts(5), 20, stop=(end,)).complete()
    assert ended.tokens == free.tokens[:index] and ended.end == end
    assert ended.log_probs == free.log_probs[: index + 1]
    assert free.end is None


def test_top_k_keeps_the_most_likely_tokens():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 30)), jnp.float32)
    best = np.argsort(-np.asarray(logits), axis=-1)
    draw = jax.jit(lambda *s: choose(logits, Sampling(*s), 0)[0])
    seen = [set() for _ in range(4)]
    for seed in range(200):
        for row, token in enumerate(np.asarray(draw(1.5, 1.0, seed, 5))):
            seen[row].add(int(token))
    assert seen == [set(row[:5].tolist()) for row in best]
    # Of these five, top_p keeps the smallest set, by the probabilities among the five.
    top = np.exp(np.asarray(logits)[0, best[0, :5]] / 1.5)
    kept = int(np.searchsorted(np.cumsum(top / top.sum()), 0.6)) + 1
    assert 1 < kept < 5
    seen = {int(draw(1.5, 0.6, seed, 5)[0]) for seed in range(200)}
    assert seen == set(best[0, :kept].tolist())
    assert np.asarray(draw(1.5, 1.0, 0, 1)).tolist() == best[:, 0].tolist()


@pytest.mark.parametrize(
    ("sampling", "limit", "message"),
    [
        (Sampling(top_k=-1), 4, "top_k=-1 is not a number of tokens: ≥ 1, or 0 for all tokens"),
        (Sampling()._replace(top_k=2.5), 4, "top_k=2.5 is not"),
        (Sampling(top_p=0.0), 4, "top_p=0.0 is not within"),
        (Sampling(-1.0), 4, "temperature=-1.0 is not"),
        (GREEDY, 0, "max_new_tokens=0 is not a number of tokens ≥ 1"),
        (GREEDY, [3, -2], "max_new_tokens=-2 is not"),
        (GREEDY, 2.5, "max_new_tokens=2.5 is not"),
        (GREEDY, True, "max_new_tokens=True is not"),
        (GREEDY, 10**20, "max_new_tokens=1000.* is not a number of tokens ≥ 1 and < 2³¹"),
        (GREEDY, 2**31, "max_new_tokens=2147483648 is not"),
        (GREEDY, [3], r"max_new_tokens has 1 values for 2 prompt\(s\): give one number"),
        (GREEDY, [3, 4, 5], "max_new_tokens has 3 values for 2"),
        (GREEDY, [[3], [4]], "max_new_tokens has 2 × 1 values for 2"),
        (GREEDY, [np.zeros((1, 2)), np.zeros((1, 3))], "max_new_tokens is neither a number nor"),
    ],
)
def test_settings_out_of_range(sampling: Any, limit: Any, message, model):
    with pytest.raises(JaxtuneError, match=message):
        start(model, prompts(3, 3), limit, sampling)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_chunk_updates_the_cache_in_place(dtype, tiny, compiled_fully):
    """The compiled program holds a few layers of the cache at most, beside the donated one."""
    directory = tiny("llama", num_hidden_layers=12)
    model = jaxtune.load(directory, dtype=dtype, progress=False)
    generation = start(model, prompts(*[5] * 8), 2000)
    next(generation)
    with jax.set_mesh(model.mesh):
        state = decoding.grow(generation._state, definition=model.definition, capacity=2048)
        trees, active = (model.base, model.trainable, model.constants), np.zeros(8, bool)
        arguments = trees, state, active, np.int32(4), generation._controls
        static = {"definition": model.definition, "options": model.options}
        compiled = decoding.decode_chunk.lower(*arguments, **static).compile()
    memory, program = compiled.memory_analysis(), compiled.as_text()
    caches = jax.tree.leaves(state.caches)
    held = sum(cache.nbytes for cache in caches)
    layer = caches[0].size // 12 * 4  # keys of one layer, which attention reads in float32
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 4 * layer < 12 * layer
    # XLA's CPU backend updates a slice of bfloat16 several times as slowly as one of uint16.
    shape = ",".join(map(str, caches[0].shape))
    assert f"[{shape}]" in program and f"bf16[{shape}]" not in program
