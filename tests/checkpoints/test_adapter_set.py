"""Adapters are switched, weighted and combined by name; the base is unchanged bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import jaxtune
from jaxtune.generation.sampling import Sampling
from jaxtune.layers.tree import flatten

TOKENS = np.random.default_rng(1).integers(3, 160, (2, 12)).astype(np.int32)
# Two float32 programs that sum in another order; see tests/parity/oracles.py.
LOGITS = 2e-5


def base_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(torch.as_tensor(TOKENS.astype(np.int64))).logits.numpy()


@pytest.fixture(scope="module")
def directories(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("named")
    lora = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    configs = {
        "law": LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], **lora),
        "chat": LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "o_proj"], **lora),
        "head": LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], **lora),
        "scales": IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = get_peft_model(base_model(tiny("llama")), config)
        with torch.no_grad():  # a head that is stored whole is to differ from the base's
            for key, value in model.named_parameters():
                if "modules_to_save" in key:
                    value.add_(0.1 * torch.randn_like(value))
        model.save_pretrained(place / name)
    return {name: place / name for name in configs}


@pytest.fixture(scope="module")
def theirs(tiny, directories):
    """PEFT's logits with each adapter alone."""
    return {
        name: logits(PeftModel.from_pretrained(base_model(tiny("llama")), directory).eval())
        for name, directory in directories.items()
    }


@pytest.fixture(scope="module")
def model(tiny, directories):
    return jaxtune.load(tiny("llama"), adapters=directories, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def plain(tiny):
    return jaxtune.load(tiny("llama"), dtype="float32", progress=False)


def same(ours, theirs):
    return np.abs(np.asarray(ours) - theirs).max() <= LOGITS * np.abs(theirs).max()


def test_each_adapter_is_switched_on_and_off_and_the_base_is_unchanged(model, plain, theirs):
    assert model.adapters == ("law", "chat", "head", "scales")
    base = np.asarray(plain.logits(TOKENS))
    assert np.array_equal(model.use(None).logits(TOKENS), base)
    for name in (*theirs, "law"):
        assert same(model.use(name).logits(TOKENS), theirs[name])
    model.use({"law": 0.5, "chat": 0.5}).logits(TOKENS)
    assert np.array_equal(model.use(None).logits(TOKENS), base)
    for path, value in flatten(plain.base):
        assert np.asarray(value).tobytes() == np.asarray(dict(flatten(model.base))[path]).tobytes()
    model.use("law")
    assert not np.array_equal(model.logits(TOKENS), base)


@pytest.mark.parametrize("method", ["linear", "cat", "ties"])
def test_a_combination_generates_like_pefts(method, model, tiny, directories):
    weights = {"law": 0.7, "chat": 0.3}
    reference = PeftModel.from_pretrained(base_model(tiny("llama")), directories["law"], "law")
    reference.load_adapter(directories["chat"], "chat")
    names, values = list(weights), list(weights.values())
    reference.add_weighted_adapter(names, values, "both", combination_type=method, density=0.5)
    reference.set_adapter("both")
    ours = model.use(weights, combine=method, density=0.5)
    assert same(ours.logits(TOKENS), logits(reference.eval()))


def test_a_combination_generates_and_merges(model, tmp_path):
    model.use({"law": 1.0, "chat": 1.0})
    expected = np.asarray(model.logits(TOKENS))
    merged = jaxtune.load(model.save_pretrained(tmp_path / "merged"), dtype="float32")
    assert same(merged.logits(TOKENS), expected)
    greedy = Sampling()
    prompts = TOKENS[:, :6].tolist()
    assert model.generate_tokens(prompts, 4, greedy) == merged.generate_tokens(prompts, 4, greedy)


def test_a_single_adapter_can_be_switched_off(tiny, directories, plain, theirs):
    model = jaxtune.load(tiny("llama"), directories["law"], dtype="float32", progress=False)
    assert same(model.logits(TOKENS), theirs["law"])
    assert np.array_equal(model.use(None).logits(TOKENS), plain.logits(TOKENS))


def test_over_a_quantized_base_the_codes_stay(tiny, directories):
    options = {"quantize": "int8", "dtype": "float32", "progress": False}
    plain = jaxtune.load(tiny("llama"), **options)
    chosen = {name: directories[name] for name in ("law", "scales")}
    model = jaxtune.load(tiny("llama"), adapters=chosen, **options)
    base = np.asarray(plain.logits(TOKENS))
    assert not np.array_equal(model.use("law").logits(TOKENS), base)
    assert not np.array_equal(model.use("scales").logits(TOKENS), base)
    assert np.array_equal(model.use(None).logits(TOKENS), base)


def test_an_unusable_choice_is_rejected_in_one_line(model, plain, tiny, directories):
    for choice, message in (
        ("lwa", 'adapter="lwa" is unknown; did you mean "law"'),
        ({"law": 1.0, "scales": 1.0}, 'adapter "scales" is IA3: only LoRA adapters'),
        ({"law": 1.0, "head": 1.0}, 'adapter "head" has modules_to_save'),
    ):
        with pytest.raises(jaxtune.JaxtuneError, match=message):
            model.use(choice)
    with pytest.raises(jaxtune.JaxtuneError, match="without adapters"):
        jaxtune.load(tiny("llama"), progress=False).use({})
    with pytest.raises(jaxtune.JaxtuneError, match="pass all of them in adapters"):
        jaxtune.load(tiny("llama"), directories["law"], adapters=directories, progress=False)
