import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jaxtune.adapters.targets import match_targets, module_names
from jaxtune.checkpoints.huggingface import read_json
from jaxtune.errors import JaxtuneError
from jaxtune.models import build_model


@pytest.fixture(scope="module")
def names(tiny):
    model = build_model(read_json(tiny("llama") / "config.json"))
    return [
        name for path, module in model.projections().items() for name in module_names(path, module)
    ]


def test_every_projection_has_the_name_that_transformers_gives_it(names, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    theirs = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(names) == theirs
    assert len(names) == len(theirs)


@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj"],
        ["q_proj", "down_proj"],
        ["mlp.up_proj"],
        ["layers.1.mlp.up_proj"],
        ["model.layers.2.self_attn.k_proj"],
        ["lm_head"],
        ["lm_head", "v_proj"],
        ["all-linear"],
        [r"model\.layers\.[02]\.self_attn\.(q|k)_proj"],
        [r".*proj"],
    ],
)
def test_targets_mean_what_they_mean_to_peft(names, tiny, targets):
    # PEFT takes an expression and all-linear as a string, names as a list.
    single = targets == ["all-linear"] or "*" in targets[0] or "(" in targets[0]
    config = LoraConfig(r=2, target_modules=targets[0] if single else targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny("llama")), config)
    assert match_targets(targets, names) == set(model.base_model.targeted_module_names)


def test_a_list_may_mix_names_and_expressions(names):
    found = match_targets(["o_proj", r".*\.1\.mlp\..*"], names)
    assert len(found) == 3 + 3


def test_a_name_is_a_whole_part_of_the_path(names):
    with pytest.raises(JaxtuneError):
        match_targets(["proj"], names)


def test_an_expression_is_of_the_whole_path(names):
    with pytest.raises(JaxtuneError):
        match_targets([r"self_attn\.(q|k)_proj"], names)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_prj"], 'adapter.targets: "q_prj" matches no module; did you mean "q_proj"?'),
        (["q_proj", "mlp.upproj"], '"mlp.upproj" matches no module; did you mean "up_proj"?'),
        (["query"], "(there are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj,"),
        ([r"layers\.7\..*"], r'"layers\.7\..*" matches no module'),
        (["embed_tokens"], '"embed_tokens" matches no module'),
        (["model.layers.3.self_attn.q_proj"], "matches no module"),
        ([r"(q_proj"], 'adapter.targets: "(q_proj" is not a valid regular expression: '),
    ],
)
def test_a_target_that_matches_nothing_lists_the_modules(names, targets, message):
    with pytest.raises(JaxtuneError, match=re.escape(message)):
        match_targets(targets, names)


def test_all_linear_leaves_the_head_out(names):
    assert set(names) - match_targets(["all-linear"], names) == {"lm_head"}
