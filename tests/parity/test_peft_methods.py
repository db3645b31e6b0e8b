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
from peft import LoraConfig, PeftModel, get_peft_model
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
