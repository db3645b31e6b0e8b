"""Adapters exported for vLLM pass its checks and make the same edits."""

from __future__ import annotations

import json

import pytest
from families import Families
from oracles import assert_same_logits, load_torch, random_tokens, relative, torch_logits
from parts import load_parts
from peft import PeftModel
from safetensors.numpy import load_file
from test_peft import with_random_factors

import jaxtune
from jaxtune.adapter_files.peft import write_adapter
from jaxtune.adapter_files.vllm import for_vllm
from jaxtune.adapters.method import StoredAdapter
from jaxtune.adapters.projections.dora import Dora
from jaxtune.adapters.projections.ia3 import IA3
from jaxtune.adapters.projections.lora import Lora
from jaxtune.adapters.virtual.prompt import Prompt

TOKENS = random_tokens(1, 2, 24)
DENSE = {
    "patterns": Lora(
        4,
        6.0,
        targets=("q_proj", "o_proj", "up_proj"),
        rank_pattern=(("up_proj", 9),),
        alpha_pattern=(("o_proj", 5.0),),
    ),
    "rslora": Lora(8, 3.0, targets=("all-linear",), rslora=True),
    "some-layers": Lora(3, 3.0, targets=(r"model\.layers\.[12]\.mlp\.up_proj", "lm_head")),
}
# Projections of latent attention, except kv_b_proj, which vLLM cannot adapt.
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")


def vllm_takes(directory, experts=0):
    """Asserts that an adapter passes the checks of vLLM; returns the names of its modules.

    vLLM's PEFTHelper reads only r, lora_alpha, bias, modules_to_save, use_rslora and use_dora from
    the config. max_lora_rank is one of a few numbers, every tensor must be a factor, and an adapted
    layer must have the three projections of all its experts, which vLLM stacks.
    """
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]
    assert config["r"] in (8, 16, 32, 64, 128, 256, 320, 512) and config["target_modules"]
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert not config.get("target_parameters")
    assert config["lora_alpha"] / config["r"] == 1 and not config["use_rslora"]
    modules = set()
    for key, value in tensors.items():
        prefix, module, factor = key[:17], key[17:].rpartition(".lora_")[0], key[-8:]
        assert prefix == "base_model.model." and factor in ("A.weight", "B.weight"), key
        assert "kv_b_proj" not in key and value.ndim == 2
        assert value.shape[0 if factor[0] == "A" else 1] == config["r"]
        modules.add(module)
    assert len(tensors) == 2 * len(modules)
    layers = {name.partition(".experts.")[0] for name in modules if ".experts." in name}
    for layer in layers:
        for projection in ("gate_proj", "up_proj", "down_proj"):
            every = {f"{layer}.experts.{e}.{projection}" for e in range(experts)}
            assert every <= modules
    return modules


def export(directory, method, target):
    """Writes a random adapter in PEFT's format and for vLLM; returns jaxtune's logits with it."""
    parts = with_random_factors(load_parts(directory, method))
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    write_adapter(target / "ours", stored)
    write_adapter(target / "vllm", for_vllm(stored, parts.definition))
    return logits(directory, target / "ours")


def logits(directory, adapter):
    return jaxtune.load(directory, adapter, dtype="float32", progress=False).logits(TOKENS)


@pytest.mark.parametrize("case", DENSE)
def test_peft_reads_the_same_edits(case, tiny, tmp_path):
    directory = tiny("llama")
    ours = export(directory, DENSE[case], tmp_path)
    vllm_takes(tmp_path / "vllm")
    base = load_torch(directory)
    plain = torch_logits(base, TOKENS)
    theirs = torch_logits(PeftModel.from_pretrained(base, tmp_path / "vllm").eval(), TOKENS)
    assert_same_logits(ours, theirs)
    assert relative(theirs, plain) > 1e-2


@pytest.mark.parametrize(
    "targets",
    [
        (*LATENT, "gate_proj", "up_proj", "down_proj"),
        pytest.param((r".*layers\.1\.mlp\.experts\.[25]\.up_proj",), marks=pytest.mark.slow),
        pytest.param(("experts.3.down_proj", "o_proj"), marks=pytest.mark.slow),
    ],
)
def test_every_expert_has_all_of_its_projections(targets, tmp_path):
    directory = Families(tmp_path)("deepseek_v3")
    settings = {"targets": targets, "rslora": True}
    if "up_proj" in targets:
        settings["rank_pattern"] = (("shared_experts.up_proj", 9),)
    ours = export(directory, Lora(2, 3.0, **settings), tmp_path)
    vllm_takes(tmp_path / "vllm", experts=8)
    assert_same_logits(logits(directory, tmp_path / "vllm"), ours)


@pytest.fixture(scope="module")
def lora(tiny):
    parts = load_parts(tiny("llama"), method := Lora(4, 6.0))
    return parts.definition, method.store(parts.definition, parts.trainable, parts.constants)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"modules_to_save": ["lm_head"]},
            r"vLLM does not support modules_to_save, .*--format merged",
        ),
        (
            {"trainable_token_indices": [3]},
            r"vLLM does not support trainable_token_indices.*merged",
        ),
        (
            {"bias": "all"},
            r'vLLM does not support trained biases, here bias="all": .*--format merged',
        ),
        ({"peft_type": "VERA"}, r"this one is VERA: write the whole model with --format merged"),
    ],
)
def test_adapters_that_vllm_rejects_are_an_error_with_an_alternative(change, message, lora):
    definition, stored = lora
    with pytest.raises(jaxtune.JaxtuneError, match=message):
        for_vllm(StoredAdapter(stored.config | change, stored.tensors), definition)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Dora(4, 6.0), "this one is DoRA: write the whole model with --format merged"),
        (IA3(("k_proj",), ()), "this one is IA3: write the whole model with --format merged"),
        (Prompt(4), "PROMPT_TUNING, which cannot be merged either: use it with --format peft"),
        (Lora(600, 6.0), "vLLM takes ranks up to 512, not 600: write the whole model"),
    ],
)
def test_other_methods_are_refused(method, message, tiny):
    parts = load_parts(tiny("llama"), method)
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    with pytest.raises(jaxtune.JaxtuneError, match=message):
        for_vllm(stored, parts.definition)


def test_adapters_that_vllm_would_ignore_are_rejected(tmp_path):
    method = Lora(2, 3.0, targets=("kv_b_proj", "o_proj"))
    parts = load_parts(Families(tmp_path)("deepseek_v2"), method)
    stored = method.store(parts.definition, parts.trainable, parts.constants)
    with pytest.raises(
        jaxtune.JaxtuneError, match=r"kv_b_proj into other weights .* would be ignored"
    ):
        for_vllm(stored, parts.definition)
