import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from jaxtune.adapter_files.fused import fuse
from jaxtune.adapters.define import define
from jaxtune.adapters.projections import lora
from jaxtune.adapters.targets import ALIASES, match_targets, module_names, parse_layers
from jaxtune.config import AdapterConfig
from jaxtune.errors import JaxtuneError
from jaxtune.models import ARCHITECTURES, build_model
from jaxtune.strict_json import read_object


@pytest.fixture(scope="module")
def names(tiny):
    model = build_model(read_object(tiny("llama") / "config.json"))
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
        (["attn"], '"attn" matches no module; did you mean "attention"?'),
        (["query"], "or for several: attention, mlp, experts, all, all-linear)"),
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


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def checkpoint(request, tiny, families):
    """A tiny checkpoint of each family."""
    mixture = request.param.startswith("deepseek")
    return (families if mixture else tiny)(request.param)


def all_names(model):
    return [
        name for path, module in model.projections().items() for name in module_names(path, module)
    ]


def test_an_alias_means_the_same_in_every_family(checkpoint):
    names = all_names(build_model(read_object(checkpoint / "config.json")))
    found = {}
    for alias in ALIASES:
        if alias == "experts" and not any(".experts." in name for name in names):
            with pytest.raises(JaxtuneError, match="none has routed experts"):
                match_targets([alias], names)
            found[alias] = set()
        else:
            found[alias] = match_targets([alias], names)
    # Three disjoint parts; what remains is the head and the routers.
    assert not found["attention"] & found["mlp"] | found["mlp"] & found["experts"]
    parts = found["attention"] | found["mlp"] | found["experts"]
    assert parts == found["all"] == found["all-linear"]
    rest = set(names) - parts
    assert "lm_head" in rest and all(n.endswith(".mlp.gate") for n in rest - {"lm_head"})
    assert all(".shared_experts." in n or ".experts." not in n for n in found["mlp"])


# transformers has no DeepSeek MoE of the first generation.
@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {"deepseek"}))
def test_peft_adapts_the_modules_that_an_alias_names(family, tiny, families):
    checkpoint = (families if family.startswith("deepseek") else tiny)(family)
    settings = read_object(checkpoint / "config.json")
    aliases = {"attention": ".self_attn.", "mlp": ".mlp.", "experts": ".experts."}
    for alias, part in aliases.items():
        if alias == "experts" and "n_routed_experts" not in settings:
            continue
        method = lora.from_config(AdapterConfig(rank=2, targets=(alias,)))
        definition = define(settings, "float32", method)
        stored = fuse(method.store(definition, *method.init(definition, 0)), definition)
        written = {key: stored.config.get(key) for key in ("target_modules", "target_parameters")}
        assert not set(written["target_modules"]) & set(ALIASES)
        theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
        linear = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
        fused = {n for n, p in theirs.named_parameters() if p.ndim == 3}
        base = get_peft_model(theirs, LoraConfig(r=2, **written)).base_model
        adapted = {*base.targeted_module_names, *getattr(base, "targeted_parameter_names", ())}
        wanted = fused if alias == "experts" else {name for name in linear if part in name}
        assert {name.removesuffix(".weight") for name in adapted} == wanted, alias


def test_the_default_targets_are_the_projections_of_attention(checkpoint):
    names = all_names(build_model(read_object(checkpoint / "config.json")))
    assert match_targets(AdapterConfig().targets, names) == match_targets(["attention"], names)
    assert any(name.endswith("o_proj") for name in match_targets(AdapterConfig().targets, names))


@pytest.mark.parametrize("text", ["0-99999999999", "9" * 5000, "1,0-10000"])
def test_a_range_of_layers_is_bounded(text):
    with pytest.raises(JaxtuneError, match=r"adapter.layers: .* no model has 10,000 layers"):
        parse_layers(text)
    assert parse_layers("0,4-7, 012-13") == (0, 4, 5, 6, 7, 12, 13)
