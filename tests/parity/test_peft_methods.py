"""Methods beside plain LoRA: trained as PEFT trains them, and read and written as PEFT does."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import Families, reference
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
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from test_training import LENGTH, run_config, write_rows

import jaxtune
from jaxtune.adapters import method_from_peft
from jaxtune.checkpoints.peft import read_adapter, write_adapter
from jaxtune.layers.tree import flatten

TOKENS = random_tokens(1, 2, 24)
SHOWS = 1e-3  # a change of the logits that no rounding makes
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
# The norm of each row comes from a sum of three terms here and of the edited weight itself there.
DORA_LOSS = 1e-4

# Of logits after training: AdamW makes more of small differences of gradients than a loss does.
TRAINED = 1e-3


class Case(NamedTuple):
    """A method as PEFT and jaxtune call it.

    Attributes:
      config: of PEFT.
      method: adapter.method of jaxtune.
      bar: on the relative error of a loss.
      learning_rate: of the recipe.
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
    "ia3": Case(IA3Config, {"feedforward_modules": ["down_proj"]}, "ia3", learning_rate=5e-2),
}
TARGETS = {
    "llama": {"target_modules": [*ATTENTION, "gate_proj", "down_proj"]},
    "deepseek_v3": {"target_modules": LATENT},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return Families(tmp_path_factory.mktemp("families"))


@pytest.fixture
def checkpoint(request, tiny, families):
    """The directory of a tiny model."""
    return tiny(request.param) if request.param == "llama" else families(request.param)


def peft_start(case, directory, model_type, target, **changes):
    """Puts a method of PEFT around a model; saves it for us to start from as well."""
    torch.manual_seed(0)
    settings = {"task_type": "CAUSAL_LM"} | TARGETS[model_type] | CASES[case].settings | changes
    model = get_peft_model(reference(directory), CASES[case].config(**settings))
    model.save_pretrained(target)
    return model


def scramble(model):
    """Draws every trained value anew, so that nothing is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in (v for v in model.parameters() if v.requires_grad):
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(value + 0.2 * noise)
    return model.eval()


ON_BOTH = pytest.mark.parametrize(
    ("checkpoint", "model_type"),
    [("llama", "llama"), pytest.param("deepseek_v3", "deepseek_v3", marks=pytest.mark.slow)],
    indirect=["checkpoint"],
    ids=["llama", "deepseek_v3"],
)


@ON_BOTH
@pytest.mark.parametrize("case", CASES)
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
def test_adapters_cross_both_ways_and_merge(case, checkpoint, model_type, tmp_path):
    base = torch_logits(reference(checkpoint), TOKENS)
    model = scramble(peft_start(case, checkpoint, model_type, tmp_path / "start"))
    model.save_pretrained(tmp_path / "theirs")
    theirs = torch_logits(model, TOKENS)
    assert relative(theirs, base) > SHOWS
    ours = jaxtune.load(checkpoint, adapter=tmp_path / "theirs", dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), theirs)
    # Written again by us, in our own terms, PEFT reads the same adapter.
    method = method_from_peft(read_adapter(tmp_path / "theirs"))
    stored = method.store(ours.definition, ours.trainable, ours.constants)
    write_adapter(tmp_path / "ours", stored)
    again = PeftModel.from_pretrained(reference(checkpoint), tmp_path / "ours").eval()
    assert_same_logits(torch_logits(again, TOKENS), theirs)
    # The merged model needs no adapter, and merging leaves the base as it was.
    before = {path: np.asarray(value).tobytes() for path, value in flatten(ours.base)}
    merged = ours.save_pretrained(tmp_path / "merged", dtype="float32")
    assert_same_logits(torch_logits(reference(merged), TOKENS), theirs)
    assert before == {path: np.asarray(value).tobytes() for path, value in flatten(ours.base)}


def test_the_scales_of_ia3_take_a_bias_along(tiny, tmp_path):
    # Qwen2's projections of queries, keys and values have biases; attention's output has none.
    directory = tiny("qwen2")
    settings = {"target_modules": ATTENTION, "feedforward_modules": []}
    model = get_peft_model(reference(directory), IA3Config(task_type="CAUSAL_LM", **settings))
    theirs = torch_logits(scramble(model), TOKENS)
    model.save_pretrained(tmp_path / "theirs")
    ours = jaxtune.load(directory, adapter=tmp_path / "theirs", dtype="float32", progress=False)
    assert_same_logits(ours.logits(TOKENS), theirs)
    merged = ours.save_pretrained(tmp_path / "merged", dtype="float32")
    assert_same_logits(torch_logits(reference(merged), TOKENS), theirs)


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
    # What the run stores is LoRA of the checkpoint as it is, for anybody.
    expected = torch_logits(model.eval(), TOKENS)
    adapter = run.adapter_directory("last")
    plain = PeftModel.from_pretrained(reference(checkpoint), adapter).eval()
    ours = run.model("last").logits(TOKENS)
    assert_same_logits(torch_logits(plain, TOKENS), ours)
    assert relative(ours, expected) <= TRAINED
    assert relative(torch_logits(reference(checkpoint), TOKENS), expected) > SHOWS
