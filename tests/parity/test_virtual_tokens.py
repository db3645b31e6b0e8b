"""Virtual tokens on every architecture: packing, decoding, training, storing and counting."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import Families
from oracles import LOSS, Recipe, assert_same_logits, make_examples, random_tokens, relative
from parts import as_batch, load_parts, train_on_eight_devices
from test_training import (
    GRAD_NORM,
    LENGTH,
    one_update,
    run_config,
    write_rows,
)

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_peft
from jaxtune.adapters.parameter_summary import parameter_summary
from jaxtune.adapters.virtual.prefix import Prefix
from jaxtune.adapters.virtual.prompt import Prompt
from jaxtune.adapters.virtual.ptuning import PTuning
from jaxtune.api.logits import make_room
from jaxtune.generation.sampling import Sampling
from jaxtune.layers.tree import flatten, unflatten

N = 5
# Each value is a sum over all tokens of all examples, whose order packing changes.
GRADIENT = 1e-4
METHODS = {
    "prompt": Prompt(N),
    "mlp": PTuning(N, "MLP", 12),
    "lstm": PTuning(N, "LSTM", 12),
    "prefix": Prefix(N),
    "projected": Prefix(N, True, 12),
}
TRAINED = {
    "prompt": {"prompt"},
    "mlp": {"prompt", "prompt.mlp_head"},
    "lstm": {"prompt", "prompt.mlp_head", "prompt.lstm_head"},
    "prefix": {"self_attn.prefix"},
    "projected": {"prefix", "prefix.transform", "self_attn.prefix.projection"},
}
DENSE = ("llama", "qwen2", "qwen3")
LATENT = ("deepseek_v2", "deepseek_v3")
EVERY = (*DENSE, "deepseek", *LATENT)
TOKENS = random_tokens(1, 2, 24)


def every(model_types, quick):
    """Parametrizes a test over architectures; all but those in `quick` are slow."""
    return pytest.mark.parametrize(
        "model_type",
        [m if m in quick else pytest.param(m, marks=pytest.mark.slow) for m in model_types],
    )


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    families = Families(tmp_path_factory.mktemp("families"))
    return lambda model_type: (tiny if model_type in DENSE else families)(model_type)


def with_effect(parts, seed=0):
    """Adds noise to the trained values, large enough to change the model's output."""
    leaves = dict(flatten(parts.trainable))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = {
        path: value + 0.5 * jax.random.normal(key, value.shape)
        for key, (path, value) in zip(keys, leaves.items(), strict=True)
    }
    return parts._replace(trainable=unflatten(drawn))


def stored(directory, method, target):
    """Writes an adapter with an effect to `target`; returns the model with it."""
    parts = with_effect(load_parts(directory, method))
    write_adapter(target, method.store(parts.definition, parts.trainable, parts.constants))
    return parts


def logits_of(model, rows):
    """Returns the logits [n, V] of each row of n tokens, computed as one right-padded batch."""
    width = max(map(len, rows))
    tokens = np.asarray([row + [0] * (width - len(row)) for row in rows])
    segments = np.asarray([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits = np.asarray(model.logits(tokens, segments))
    return [line[: len(row)] for line, row in zip(logits, rows, strict=True)]


def opened(directory, target, **options):
    return jaxtune.load(directory, adapter=target, dtype="float32", progress=False, **options)


@pytest.mark.parametrize("method", METHODS)
@every(EVERY, quick=("qwen2", "deepseek_v2"))
def test_the_stored_adapter_is_the_trained_one(model_type, method, checkpoint, tmp_path):
    directory = checkpoint(model_type)
    parts = stored(directory, METHODS[method], tmp_path / "adapter")
    again = read_adapter(tmp_path / "adapter", encoder=True)
    assert method_from_peft(again) == METHODS[method]
    trainable, _ = METHODS[method].restore(parts.definition, again)
    jax.tree.map(np.testing.assert_array_equal, trainable, parts.trainable)
    groups = {row.group for row in parameter_summary(parts.definition) if row.kind == "trained"}
    assert groups == TRAINED[method]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@every(EVERY, quick=("deepseek_v3",))
def test_each_segment_sees_the_virtual_tokens_and_no_other_segment(
    model_type, method, checkpoint, tmp_path
):
    directory = checkpoint(model_type)
    stored(directory, METHODS[method], tmp_path / "adapter")
    model = opened(directory, tmp_path / "adapter")
    segments = np.asarray([[1] * 7 + [2] * 9 + [0] * 8, [0] * 3 + [1] * 6 + [2] * 15])
    packed = np.asarray(model.logits(TOKENS, segments))
    plain = np.asarray(opened(directory, None).logits(TOKENS, segments))
    places = [segments[row] == segment for row in range(2) for segment in (1, 2)]
    alone = logits_of(model, [TOKENS[i // 2, place].tolist() for i, place in enumerate(places)])
    for i, place in enumerate(places):
        assert_same_logits(packed[i // 2, place], alone[i])
        assert relative(plain[i // 2, place], alone[i]) > 1e-2
    blockwise = opened(directory, tmp_path / "adapter", attention="blockwise")
    seen = segments != 0
    assert_same_logits(np.asarray(blockwise.logits(TOKENS, segments))[seen], packed[seen])


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@every(["qwen3", "deepseek", *LATENT], quick=("qwen3",))
def test_decoding_gives_the_tokens_of_whole_passes(model_type, method, checkpoint, tmp_path):
    directory = checkpoint(model_type)
    stored(directory, METHODS[method], tmp_path / "adapter")
    model = opened(directory, tmp_path / "adapter")
    model.stop_ids = ()
    prompts = [random_tokens(i, n).tolist() for i, n in enumerate((3, 17, 1))]
    new = model.generate_tokens(prompts, 8, Sampling())
    whole = logits_of(model, [prompt + row for prompt, row in zip(prompts, new, strict=True)])
    for prompt, row, logits in zip(prompts, new, whole, strict=True):
        at = logits[len(prompt) - 1 : -1]
        # The most likely token of a full pass, or one whose logit differs by rounding only.
        chosen = at[np.arange(len(row)), row]
        assert (at.max(-1) - chosen <= 1e-4 * np.abs(at).max()).all()


@pytest.mark.parametrize("method", ["lstm", "projected"])
@every(["llama", "deepseek_v3"], quick=("llama",))
def test_packed_rows_have_the_gradient_of_single_ones(model_type, method, checkpoint):
    parts = with_effect(load_parts(checkpoint(model_type), METHODS[method]))
    rows = make_examples(8, longest=LENGTH, seed=4)
    reserved = parts.definition.reserved
    assert reserved == (N if method == "lstm" else 0)
    unpacked = as_batch(rows, 8, LENGTH, packing=False, reserved=reserved)
    packed = as_batch(rows, 4, 2 * LENGTH + 2 * reserved, packing=True, reserved=reserved)
    assert packed["segment_ids"].max() > 1
    loss, expected = one_update(parts, unpacked, 1)
    other_loss, gradient = one_update(parts, packed, 2)
    assert relative(other_loss, loss) <= LOSS
    for path, value in expected.items():
        assert np.any(np.asarray(value)), path
        assert relative(gradient[path], value) <= GRADIENT, path


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model_type", ["deepseek", *LATENT])
def test_the_loss_falls(model_type, method, checkpoint, tmp_path):
    # Prefixes without a network are small at first and change by at most the rate per step.
    rate = 1e-1 if method == "prefix" else 2e-2
    recipe = Recipe(steps=30, accumulation=1, learning_rate=rate, weight_decay=0.0)
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(8, longest=LENGTH))
    adapter = {"encoder_hidden_size": 12, "virtual_tokens": N}
    adapter |= {
        "prompt": {"method": "prompt"},
        "mlp": {"method": "ptuning"},
        "lstm": {"method": "ptuning", "encoder_reparameterization_type": "LSTM", "dropout": 0.1},
        "prefix": {"method": "prefix"},
        "projected": {"method": "prefix", "prefix_projection": True},
    }[method]
    config = run_config(
        checkpoint(model_type), rows, recipe, adapter=adapter, data={"packing": True}
    )
    losses = [line["loss"] for line in jaxtune.train(config, tmp_path / "run").metrics()]
    assert losses[-1] < 0.9 * losses[0]


def test_a_prompt_can_start_from_text(tiny_chat, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(8, longest=LENGTH))
    recipe = Recipe(steps=0)
    for text, n in (("ab", 5), ("abcdef", 3)):
        adapter = {"method": "prompt", "prompt_init_text": text, "virtual_tokens": n}
        run = jaxtune.train(run_config(tiny_chat, rows, recipe, adapter=adapter), tmp_path / text)
        embeddings = read_adapter(run.adapter_directory("last")).tensors["prompt_embeddings"]
        model = opened(tiny_chat, None)
        ids = model.tokenizer(text)["input_ids"]
        expected = np.asarray(model.base["model"]["embed_tokens"]["weight"])[(ids * 3)[:n]]
        np.testing.assert_array_equal(embeddings, expected)


def test_positions_are_reserved_in_front_of_every_segment():
    tokens, segments = (
        jnp.asarray([[0, 7, 8, 9], [5, 6, 0, 0]]),
        jnp.asarray([[0, 1, 1, 2], [3, 3, 0, 0]]),
    )
    positions = jnp.asarray([[0, 0, 1, 0], [0, 1, 0, 0]])
    wide, inside, place, text = make_room(tokens, segments, positions, 2)
    assert wide.tolist() == [[0, 0, 0, 7, 8, 0, 0, 9], [0, 0, 5, 6, 0, 0, 0, 0]]
    assert inside.tolist() == [[0, 1, 1, 1, 1, 2, 2, 2], [3, 3, 3, 3, 0, 0, 0, 0]]
    assert place.tolist() == [[0, 0, 1, 2, 3, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert text.tolist() == [[0, 3, 4, 7], [2, 3, 4, 5]]


def test_virtual_tokens_cannot_be_merged(checkpoint, tmp_path):
    stored(checkpoint("llama"), METHODS["prompt"], tmp_path / "adapter")
    model = opened(checkpoint("llama"), tmp_path / "adapter")
    with pytest.raises(jaxtune.JaxtuneError, match=r"adapter\.method=prompt cannot be merged"):
        model.save_pretrained(tmp_path / "merged")


def test_a_prefix_of_another_attention_is_refused(checkpoint, tmp_path):
    stored(checkpoint("llama"), METHODS["prefix"], tmp_path / "adapter")
    with pytest.raises(jaxtune.JaxtuneError, match="\"peft_type\" is 'PREFIX_TUNING', the model"):
        opened(checkpoint("deepseek_v3"), tmp_path / "adapter")


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "ptuning", "virtual_tokens": 4, "encoder_reparameterization_type": "LSTM"},
        {"method": "prefix", "prefix_projection": True},
        {"method": "bottleneck", "placement": "houlsby"},
    ],
    ids=["ptuning", "projected", "bottleneck"],
)
def test_eight_devices_train_as_one_does(adapter, checkpoint, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", make_examples(40, longest=LENGTH))
    recipe = Recipe(steps=3, batch_size=16, accumulation=2, warmup_steps=1)
    sections = {"adapter": adapter | {"encoder_hidden_size": 8}, "data": {"packing": True}}
    directory = checkpoint("deepseek_v3")
    expected = jaxtune.train(run_config(directory, rows, recipe, **sections), tmp_path / "one")
    mesh = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
    config = run_config(directory, rows, recipe, **sections, mesh=mesh)
    train_on_eight_devices({tmp_path / "eight": config})
    ours = jaxtune.Run(tmp_path / "eight").metrics()
    for line, other in zip(ours, expected.metrics(), strict=True):
        assert relative(line["loss"], other["loss"]) <= LOSS
        assert relative(line["grad_norm"], other["grad_norm"]) <= GRAD_NORM
