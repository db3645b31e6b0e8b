"""Methods other than plain LoRA train as in PEFT, and both programs read each other's files."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import reference
from oracles import (
    LOSS,
    Recipe,
    assert_same_logits,
    make_examples,
    random_tokens,
    relative,
    torch_logits,
    train_torch,
)
from parts import load_parts
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from test_training import LENGTH, run_config, write_rows

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_config, method_from_peft
from jaxtune.adapters.define import define
from jaxtune.adapters.projections.lora import Lora
from jaxtune.adapters.projections.slots import adapters
from jaxtune.api import Model
from jaxtune.config import resolve
from jaxtune.layers.tree import flatten
from jaxtune.parallel.mesh import single_device_mesh
from jaxtune.strict_json import read_object

TOKENS = random_tokens(1, 2, 24)
SHOWS = 1e-3  # a change of the logits beyond any rounding error
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# jaxtune computes the norm of a row as a sum of three terms, PEFT from the edited weight.
DORA_LOSS = 1e-4

# Error of logits after training: AdamW amplifies small differences of gradients.
TRAINED = 1e-3


class Case(NamedTuple):
    """A method in PEFT and in jaxtune.

    Attributes:
      config: class of PEFT's config.
      settings: arguments of the class.
      method: ``adapter.method`` in jaxtune.
      bar: tolerance of the relative error of a loss.
      learning_rate: learning rate of the recipe.
    """

    config: type
    settings: dict[str, Any]
    method: str
    bar: float = LOSS
    learning_rate: float = 5e-3


CASES = {
    "rslora": Case(LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True}, "lora"),
    "dora": Case(LoraConfig, {"r": 4, "lora_alpha": 8, "use_dora": True}, "dora", DORA_LOSS),
    "vera": Case(VeraConfig, {"r": 24}, "vera", learning_rate=5e-2),
    "saved": Case(
        LoraConfig, {"r": 4, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, "lora"
    ),
    "tokens": Case(LoraConfig, {"r": 4, "trainable_token_indices": [157, 158, 159]}, "lora"),
    "ia3": Case(IA3Config, {}, "ia3", learning_rate=5e-2),
}
TARGETS = {
    "llama": {"target_modules": [*ATTENTION, "gate_proj", "down_proj"]},
    "deepseek_v3": {"target_modules": LATENT},
}


@pytest.fixture
def checkpoint(request, tiny, families):
    """The directory of a tiny model."""
    return tiny(request.param) if request.param == "llama" else families(request.param)


def peft_start(case, directory, model_type, target, **changes):
    """Wraps a model in a method of PEFT; saves the initial adapter, from which jaxtune starts."""
    torch.manual_seed(0)
    settings = {"task_type": "CAUSAL_LM"} | TARGETS[model_type] | CASES[case].settings | changes
    if case == "ia3":
        settings["feedforward_modules"] = ["o_proj"]
    model = get_peft_model(reference(directory), CASES[case].config(**settings))
    model.save_pretrained(target)
    return model


def scramble(model):
    """Adds noise to every trained value, so that no part of the method is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (v for v in model.parameters() if v.requires_grad):
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(value + 0.2 * noise)
    return model.eval()


SLOW_BUT_DORA = [
    pytest.param(case, marks=() if case == "dora" else pytest.mark.slow) for case in CASES
]
ON_BOTH = pytest.mark.parametrize(
    ("checkpoint", "model_type"),
    [("llama", "llama"), pytest.param("deepseek_v3", "deepseek_v3", marks=pytest.mark.slow)],
    indirect=["checkpoint"],
    ids=["llama", "deepseek_v3"],
)


@ON_BOTH
@pytest.mark.parametrize("case", SLOW_BUT_DORA)
def test_it_trains_as_peft_does(case, checkpoint, model_type, tmp_path):
    recipe = Recipe(accumulation=1, learning_rate=CASES[case].learning_rate)
    examples = make_examples(60, longest=LENGTH)
    config = run_config(
        checkpoint,
        write_rows(tmp_path / "rows.jsonl", examples),
        recipe,
        adapter={"method": CASES[case].method, "init_from": str(tmp_path / "start")},
    )
    model = peft_start(case, checkpoint, model_type, tmp_path / "start")
    run = jaxtune.train(config, tmp_path / "run")
    ours = [line["loss"] for line in run.metrics()]
    theirs = [update.loss for update in train_torch(model, examples, recipe)]
    errors = [relative(*losses) for losses in zip(ours, theirs, strict=True)]
    assert max(errors) <= CASES[case].bar, errors
    assert abs(theirs[-1] - theirs[0]) > 100 * LOSS * theirs[0]


@ON_BOTH
@pytest.mark.parametrize("case", CASES)
def test_adapters_are_exchanged_in_both_directions_and_merge(
    case, checkpoint, model_type, tmp_path
):
    base = torch_logits(reference(checkpoint), TOKENS)
    model = scramble(peft_start(case, checkpoint, model_type, tmp_path / "start"))
    model.save_pretrained(tmp_path / "theirs")
    theirs = torch_logits(model, TOKENS)
    assert relative(theirs, base) > SHOWS
    ours = jaxtune.load(checkpoint, adapter=tmp_path / "theirs", dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), theirs)
    # PEFT reads the same adapter from the files that jaxtune writes.
    method = method_from_peft(read_adapter(tmp_path / "theirs"))
    stored = method.store(ours.definition, ours.trainable, ours.constants)
    write_adapter(tmp_path / "ours", stored)
    again = PeftModel.from_pretrained(reference(checkpoint), tmp_path / "ours").eval()
    assert_same_logits(torch_logits(again, TOKENS), theirs)
    # The merged model needs no adapter, and merging does not change the base in memory.
    before = {path: np.asarray(value).tobytes() for path, value in flatten(ours.base)}
    merged = ours.save_pretrained(tmp_path / "merged", dtype="float32")
    assert_same_logits(torch_logits(reference(merged), TOKENS), theirs)
    assert before == {path: np.asarray(value).tobytes() for path, value in flatten(ours.base)}


def test_the_scales_of_ia3_take_a_bias_along(tiny, tmp_path):
    # In Qwen2, q_proj, k_proj and v_proj have biases; o_proj has none.
    directory = tiny("qwen2")
    settings = {"target_modules": ATTENTION, "feedforward_modules": []}
    model = get_peft_model(reference(directory), IA3Config(task_type="CAUSAL_LM", **settings))
    theirs = torch_logits(scramble(model), TOKENS)
    model.save_pretrained(tmp_path / "theirs")
    ours = jaxtune.load(directory, adapter=tmp_path / "theirs", dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), theirs)
    merged = ours.save_pretrained(tmp_path / "merged", dtype="float32")
    assert_same_logits(torch_logits(reference(merged), TOKENS), theirs)


@pytest.mark.slow
@ON_BOTH
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha-r", "rslora"])
def test_pissa_starts_and_trains_as_peft_does(rslora, checkpoint, model_type, tmp_path):
    recipe, examples = Recipe(accumulation=1), make_examples(60, longest=LENGTH)
    targets = TARGETS[model_type]["target_modules"]
    section = {"method": "pissa", "rank": 4, "alpha": 8.0, "targets": targets, "rslora": rslora}
    rows = write_rows(tmp_path / "rows.jsonl", examples)
    run = jaxtune.train(run_config(checkpoint, rows, recipe, adapter=section), tmp_path / "run")
    torch.manual_seed(0)
    start = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        init_lora_weights="pissa",
        use_rslora=rslora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(reference(checkpoint), start)
    theirs = [update.loss for update in train_torch(model, examples, recipe)]
    errors = [
        relative(line["loss"], loss) for line, loss in zip(run.metrics(), theirs, strict=True)
    ]
    assert max(errors) <= LOSS, errors
    # The run stores plain LoRA of the unchanged checkpoint, which PEFT can load.
    expected = torch_logits(model.eval(), TOKENS)
    adapter = run.adapter_directory("last")
    plain = PeftModel.from_pretrained(reference(checkpoint), adapter).eval()
    ours = run.model("last").logits(TOKENS)
    assert_same_logits(torch_logits(plain, TOKENS), ours)
    assert relative(ours, expected) <= TRAINED
    assert relative(torch_logits(reference(checkpoint), TOKENS), expected) > SHOWS


def test_patterns_and_layers_choose_what_peft_chooses(tiny, tmp_path):
    directory = tiny("llama")
    ranks, alphas = {r"layers\.1\.self_attn\.q_proj": 2, "up_proj": 7}, {"up_proj": 5}
    torch.manual_seed(0)
    peft = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        layers_to_transform=[1, 2],
        rank_pattern=ranks,
        alpha_pattern=alphas,
        init_lora_weights=False,
    )
    get_peft_model(reference(directory), peft).save_pretrained(tmp_path / "adapter")
    theirs = method_from_peft(read_adapter(tmp_path / "adapter"))
    section = {
        "rank": 4,
        "alpha": 8.0,
        "targets": ("q_proj", "up_proj"),
        "layers": "1-2",
        "rank_pattern": [f"{pattern}={rank}" for pattern, rank in ranks.items()],
        "alpha_pattern": [f"{pattern}={alpha}" for pattern, alpha in alphas.items()],
    }
    ours = method_from_config(resolve({"adapter": section}).adapter)
    config = read_object(directory / "config.json")
    found = [
        {name: adapter.settings for name, adapter in adapters_by_name(define(config, "float32", m))}
        for m in (ours, theirs)
    ]
    assert found[0] == found[1]
    assert {setting and setting.rank for s in found[0].values() for setting in s} == {None, 2, 4, 7}


def adapters_by_name(definition):
    """Yields the path of each adapted projection and its adapter."""
    return (((".").join(path), adapter) for path, _, adapter in adapters(definition))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "3"}, r"adapter\.layers: there is no layer 3 \(the last is 2\)"),
        ({"layers": "2-1"}, r'adapter\.layers: "2-1" is neither a layer nor a range like 4-7'),
        ({"rank_pattern": "k_proj=2"}, r'adapter\.rank_pattern: "k_proj" applies to none of'),
        ({"rank_pattern": "q_proj=0"}, r'adapter\.rank_pattern: "q_proj=0" is not a rank'),
        ({"alpha_pattern": "q_proj"}, r'adapter\.alpha_pattern: "q_proj" is not a pattern and its'),
        ({"new_tokens": 160}, r"adapter\.new_tokens=160 is not less than all 160 tokens"),
        ({"new_tokens": 1, "modules_to_save": "embed_tokens"}, r"both train embed_tokens"),
        ({"modules_to_save": "lm_haed"}, r'"lm_haed" matches no module; did you mean "lm_head"'),
        ({"modules_to_save": "layers.0.input_layernorm"}, r"input_layernorm names one layer"),
        ({"modules_to_save": "q_proj"}, r"q_proj is in adapter\.modules_to_save, which trains all"),
    ],
)
def test_an_invalid_setting_is_rejected_by_name(settings, message, tiny):
    config = read_object(tiny("llama") / "config.json")
    with pytest.raises(jaxtune.JaxtuneError, match=message):
        section = resolve({"adapter": {"targets": "q_proj"} | settings}).adapter
        define(config, "float32", method_from_config(section))


def test_tied_embeddings_are_not_trained_as_two(tiny):
    config = read_object(tiny("llama", tie_word_embeddings=True) / "config.json")
    for name in ("lm_head", "embed_tokens"):
        with pytest.raises(jaxtune.JaxtuneError, match=f"{name} is both embedding and head"):
            define(config, "float32", Lora(modules_to_save=(name,)))


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_as_the_base_and_count_in_a_tied_head(tied, tiny, tmp_path):
    directory = tiny("llama", tie_word_embeddings=tied)
    tokens = np.concatenate([TOKENS, TOKENS % 3 + 157], axis=1)
    base = jaxtune.load(directory, dtype="float32", progress=False).logits(tokens)
    parts = load_parts(directory, Lora(4, 8.0, new_tokens=3, token_ids=(157, 158, 159)))
    model = Model(parts, directory, single_device_mesh(), dtype="float32")
    # The columns of new tokens in the head are a separate product, summed in a different order.
    assert_same_logits(model.logits(tokens), base)
    peft = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices=[157, 158, 159],
        task_type="CAUSAL_LM",
    )
    theirs = scramble(get_peft_model(reference(directory), peft))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = jaxtune.load(directory, adapter=tmp_path / "theirs", dtype="float32", progress=False)
    expected = torch_logits(theirs, tokens)
    assert_same_logits(ours.logits(tokens), expected)
    merged = ours.save_pretrained(tmp_path / "merged", dtype="float32")
    assert_same_logits(torch_logits(reference(merged), tokens), expected)
