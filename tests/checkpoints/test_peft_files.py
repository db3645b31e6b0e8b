"""Adapter directories: written completely, and rejected in one line if they do not fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter, write_adapter_files
from jaxtune.atomic_files import new_directory
from jaxtune.errors import JaxtuneError

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def peft_made(tiny, tmp_path_factory):
    """An adapter that PEFT wrote."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(peft_made, tmp_path):
    """A copy of it to damage."""
    shutil.copytree(peft_made, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_adapters_of_peft_are_written_back_bit_for_bit(peft_made, tmp_path):
    write_adapter(tmp_path / "out", read_adapter(peft_made))
    before = load_file(peft_made / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    ours, theirs = (
        PeftConfig.from_pretrained(tmp_path / "out"),
        PeftConfig.from_pretrained(peft_made),
    )
    assert ours.to_dict() == theirs.to_dict()


def test_an_adapter_is_replaced_only_when_asked(adapter):
    stored = read_adapter(adapter)
    with pytest.raises(JaxtuneError, match="already exists"):
        write_adapter(adapter, stored)
    with new_directory(adapter, replace=True) as scratch:
        write_adapter_files(scratch, stored._replace(tensors={"x": np.ones(2, np.float32)}))
    assert list(read_adapter(adapter).tensors) == ["x"]
    # What was read before is still whole: its file lives on under the mapping.
    assert np.isfinite(stored.tensors[A]).all()


def refusal(base, adapter):
    with pytest.raises(JaxtuneError) as raised:
        jaxtune.load(base, adapter=adapter, progress=False)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_an_unknown_adapter(tiny, tmp_path):
    assert refusal(tiny("llama"), tmp_path / "no").endswith("no/adapter_config.json: no such file")


def test_weights_that_are_not_there_or_cut(tiny, adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(tiny("llama"), adapter).startswith(f"{path}: not a valid safetensors file")
    path.unlink()
    assert refusal(tiny("llama"), adapter) == f"{path}: no such file, nor adapter_model.bin"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, 'adapter_config.json: peft_type="LOHA" is unknown'),
        ({"peft_type": None}, 'adapter_config.json: peft_type="None" is unknown'),
        (
            {"use_dora": True},
            'adapter_model.safetensors: "model.layers.0.mlp.down_proj" lacks lora_magnitude_vector',
        ),
        (
            {"bias": "al"},
            'adapter_config.json: "bias"=\'al\' is not "none", "all" or "lora_only"',
        ),
        (
            {"modules_to_save": ["lm_head"]},
            'adapter_model.safetensors: lacks "base_model.model.lm_head.weight"',
        ),
        (
            {"modules_to_save": ["lm_heads"]},
            'adapter_config.json: "modules_to_save": "lm_heads" matches no module; did you mean '
            '"lm_head"?',
        ),
        (
            {"init_lora_weights": "pissa"},
            "adapter_config.json: \"init_lora_weights\"='pissa' means factors over",
        ),
        ({"lora_alpha": "x"}, "adapter_config.json: \"lora_alpha\"='x' is not a number"),
        ({"lora_alpha": 1e308}, 'adapter_config.json: "lora_alpha"=1e+308 is not a number up to'),
        ({"lora_alpha": None}, 'adapter_config.json: "lora_alpha"=null is not a number'),
        ({"lora_dropout": 1.5}, 'adapter_config.json: "lora_dropout"=1.5 is not a number from 0'),
        ({"alpha_pattern": {"(": 1}}, 'adapter_config.json: "alpha_pattern" has an invalid'),
        ({"alpha_pattern": {"q": []}}, "adapter_config.json: \"alpha_pattern\"={'q': []} is not"),
        ({"alpha_pattern": [1]}, 'adapter_config.json: "alpha_pattern"=[1] is not an object'),
        ({"rank_pattern": {"q": -1}}, "adapter_config.json: \"rank_pattern\"={'q': -1} is not an"),
        ({"rank_pattern": 5}, 'adapter_config.json: "rank_pattern"=5 is not an object of positive'),
        ({"use_rslora": "no"}, "adapter_config.json: \"use_rslora\"='no' is not true or false"),
        ({"task_type": 5}, 'adapter_config.json: "task_type"=5 is not "CAUSAL_LM" or "FEATURE_EX'),
        ({"task_type": "SEQ_CLS"}, 'adapter_config.json: "task_type"=\'SEQ_CLS\' is not "CAUSAL'),
        ({"modules_to_save": 5}, 'adapter_config.json: "modules_to_save"=5 is not a list of names'),
        ({"inference_mode": "x"}, "adapter_config.json: \"inference_mode\"='x' is not true or"),
        # PEFT computes something else with these.
        ({"layer_replication": [[0, 1]]}, 'adapter_config.json: "layer_replication"=[[0, 1]] of a'),
        ({"alora_invocation_tokens": [1]}, 'adapter_config.json: "alora_invocation_tokens"=[1] of'),
        ({"kasa_config": {}}, 'adapter_config.json: "kasa_config"={} of a LORA adapter is not'),
        ({"fan_in_fan_out": True}, 'adapter_config.json: "fan_in_fan_out"=True of a LORA adapter'),
        ({"new_setting": 0}, 'adapter_config.json: "new_setting"=0 of a LORA adapter is not supp'),
        (
            {"n" * 99: 10**999},
            f'adapter_config.json: "{"n" * 60}"=an integer of 3319 bits of a LORA adapter',
        ),
        # PEFT would leave out what the tensors edit, or refuse their shape.
        (
            {"layers_to_transform": [1]},
            'adapter_config.json: "layers_to_transform"=[1] leaves model.layers.0.mlp.down_proj',
        ),
        (
            {"exclude_modules": ["q_proj"]},
            "adapter_config.json: \"exclude_modules\"=['q_proj'] leaves model.layers.0.self_attn.q",
        ),
        (
            {"target_modules": ".*q_proj"},
            "adapter_config.json: \"target_modules\"='.*q_proj' leaves model.layers.0.mlp",
        ),
        ({"target_modules": "("}, 'adapter_config.json: "target_modules" has an invalid regular'),
        (
            {"target_modules": "(.|.)*(?<!.)x?y"},
            'adapter_config.json: "target_modules" has a regular expression that takes longer than',
        ),
        (
            {"target_modules": ["nope"]},
            "adapter_config.json: \"target_modules\"=['nope'] leaves mod",
        ),
        ({"target_modules": []}, 'adapter_config.json: "target_modules"=[] leaves model.layers.0.'),
        # PEFT has a default for each architecture: q_proj and v_proj here.
        (
            {"target_modules": None},
            'adapter_config.json: "target_modules"=None leaves model.layers',
        ),
        (
            {"target_parameters": ["x"], "target_modules": ["k_proj"]},
            'adapter_config.json: "target_',
        ),
        (
            {"layers_to_transform": [0, 1, 2], "layers_pattern": "h"},
            'adapter_config.json: "layers_to_transform"=[0, 1, 2] leaves model.layers.0.mlp.down',
        ),
        (
            {"layers_pattern": "layers"},
            'adapter_config.json: "layers_pattern" is given without "layers_to_transform"',
        ),
        (
            {"target_modules": ".*", "layers_to_transform": [0, 1, 2]},
            'adapter_config.json: "layers_to_transform" cannot be used where "target_modules" is a',
        ),
        ({"exclude_modules": 5}, 'adapter_config.json: "exclude_modules"=5 is not a list of names'),
        ({"target_modules": [1]}, 'adapter_config.json: "target_modules"=[1] is not a list of'),
        ({"layers_to_transform": True}, 'adapter_config.json: "layers_to_transform"=True is not'),
        ({"r": 8}, "adapter_config.json gives model.layers.0.mlp.down_proj the rank 8"),
        ({"r": None}, 'adapter_config.json: "r"=null is not a positive integer'),
        ({"r": 0}, 'adapter_config.json: "r"=0 is not a positive integer'),
        ({"r": "4"}, "adapter_config.json: \"r\"='4' is not a positive integer"),
        ({"r": 10**12}, 'adapter_config.json: "r"=1000000000000 is not a positive integer'),
        (
            {"rank_pattern": {"q_proj": 2}},
            "adapter_config.json gives model.layers.0.self_attn.q_proj the rank 2",
        ),
        ({"target_parameters": True}, 'adapter_config.json: "target_parameters"=True is not a'),
    ],
)
def test_an_unsupported_or_invalid_setting_is_rejected_by_name(tiny, adapter, changes, message):
    path = adapter / "adapter_config.json"
    text = json.dumps(json.loads(path.read_text()) | changes)
    path.write_text(text.replace("Infinity", "1e999"))
    assert refusal(tiny("llama"), adapter).startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B), '"model.layers.0.self_attn.q_proj" lacks lora_B'),
        (lambda t: t.pop(A), '"model.layers.0.self_attn.q_proj" lacks lora_A'),
        (lambda t: t.update({"x": torch.ones(1)}), '"x" is not a LoRA factor'),
        (lambda t: t.update({A: torch.ones(())}), 'lora_A.weight" is not a LoRA factor'),
        (lambda t: t.update({A: torch.ones(4, 64, dtype=torch.int8)}), "is not a LoRA factor"),
        (lambda t: t.update({B: torch.ones(64, 8)}), "has shape [64, 8], the model needs [64, 4]"),
        (lambda t: t.update({A: torch.ones(4, 63)}), "has shape [4, 63], the model needs [4, 64]"),
        (
            lambda t: t.update({k.replace("0.self", "9.self"): t[k].clone() for k in (A, B)}),
            "the adapter edits model.layers.9.self_attn.q_proj, which the model does not have",
        ),
        (lambda t: t.clear(), "holds no LoRA factors"),
    ],
)
def test_factors_that_do_not_fit(tiny, adapter, change, message):
    path = adapter / "adapter_model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    assert message in refusal(tiny("llama"), adapter)


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """Adapters of other methods that PEFT wrote, by method."""
    made = tmp_path_factory.mktemp("others")
    settings = {
        "ia3": IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
        "vera": VeraConfig(r=4, target_modules=["q_proj"]),
        "tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 9]),
    }
    for name, config in settings.items():
        model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
        get_peft_model(model, config).save_pretrained(made / name)
    return made


IA3 = "base_model.model.model.layers.0.self_attn.o_proj.ia3_l"
TOKENS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("method", "settings", "tensors", "message"),
    [
        (
            "ia3",
            {"feedforward_modules": ["k_proj"]},
            {},
            "\"feedforward_modules\"=['k_proj'] scales the inputs of model.layers.0.self_attn.k",
        ),
        (
            "ia3",
            {"feedforward_modules": []},
            {},
            "scales the outputs of model.layers.0.self_attn.o_",
        ),
        (
            "ia3",
            {},
            {IA3: torch.ones(64, 1)},
            "scales the inputs of model.layers.0.self_attn.o_proj",
        ),
        ("ia3", {"target_modules": ["k_proj"]}, {}, "leaves model.layers.0.self_attn.o_proj out"),
        ("vera", {"r": 8}, {}, "gives model.layers.0.self_attn.q_proj the rank 8"),
        ("vera", {}, {"base_model.vera_A": torch.ones(0, 64)}, "is float32 [0, 64], not a matrix"),
        ("vera", {}, {"base_model.vera_A": torch.tensor(1.0)}, "is float32 [], not a matrix"),
        ("vera", {}, {"base_model.vera_B": torch.ones(64, 4, dtype=int)}, "not a matrix"),
        (
            "tokens",
            {},
            {TOKENS: torch.ones(2, 64, dtype=torch.int32)},
            "is int32, not floating point",
        ),
        ("tokens", {"trainable_token_indices": [3] * 99}, {}, "not a list of distinct token ids"),
        (
            "tokens",
            {"r": 0},
            {A: torch.ones(0, 64), B: torch.ones(64, 0)},
            '"r"=0 is not a positive',
        ),
        ("tokens", {}, {A: torch.ones(0, 64), B: torch.ones(64, 0)}, 'lora_A.weight" has 0'),
    ],
)
def test_contradictions_of_other_methods(
    tiny, others, tmp_path, method, settings, tensors, message
):
    adapter = tmp_path / "adapter"
    shutil.copytree(others / method, adapter)
    path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    jaxtune.load(tiny("llama"), adapter=adapter, progress=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    save_file({name: v.clone() for name, v in load_file(weights).items()} | tensors, weights)
    found = refusal(tiny("llama"), adapter)
    assert message in found
    assert len(found) < 400


def test_peft_refuses_the_end_of_ia3_as_well(tiny, others, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(others / "ia3", adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"feedforward_modules": ["k_proj"]}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny("llama")), adapter)
