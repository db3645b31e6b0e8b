"""Combinations of adapters equal PEFT's; random ones have the right mean and follow the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from jaxtune.adapter_files.combine import COMBINATIONS, Options, combine, read_pairs
from jaxtune.adapter_files.peft import read_adapter
from jaxtune.errors import JaxtuneError

# float32 sums of two or three terms, in another order.
SAME = 1e-6
# PEFT decomposes in float32, where a pruned edit is cut between singular values that are close.
DECOMPOSED = 1e-4
WEIGHTS = {"law": 0.7, "chat": -0.4, "code": 1.3}
SETTINGS = {
    "law": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
    "chat": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "code": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "up_proj", "v_proj"]},
}
DETERMINISTIC = sorted(name for name in COMBINATIONS if "dare" not in name)


def base_model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def make(directory, target, seed=0, **settings):
    """Writes an adapter of PEFT with random factors."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    get_peft_model(base_model(directory), config).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def directories(tiny, tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    return {
        name: make(tiny("llama"), place / name, seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items())
    }


@pytest.fixture(scope="module")
def adapters(directories):
    return {name: read_adapter(directory) for name, directory in directories.items()}


@pytest.fixture(scope="module")
def theirs(tiny, directories):
    """PEFT's model with all adapters, to which it adds combinations."""
    model = PeftModel.from_pretrained(base_model(tiny("llama")), directories["law"], "law")
    for name in ("chat", "code"):
        model.load_adapter(directories[name], name)
    return model


def edits(stored):
    return {name: pair.edit for name, pair in read_pairs("combined", stored).items()}


def peft_edits(model, name):
    """The edits of an adapter within PEFT's model, by module; those it leaves alone are zeros."""
    return {
        module.removeprefix("base_model.model."): layer.get_delta_weight(name).detach().numpy()
        for module, layer in model.named_modules()
        if name in getattr(layer, "lora_A", {})
    }


def distance(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_a_combination_equals_pefts(method, majority, adapters, theirs):
    if majority == "frequency" and "ties" not in method:
        return
    name = f"{method}-{majority}"
    theirs.add_weighted_adapter(
        list(WEIGHTS),
        list(WEIGHTS.values()),
        name,
        combination_type=method,
        density=0.5,
        majority_sign_method=majority,
    )
    expected = peft_edits(theirs, name)
    ours = edits(combine(adapters, WEIGHTS, method, Options(majority=majority)))
    assert set(ours) == set(expected)
    bar = DECOMPOSED if method.endswith("svd") else SAME
    assert max(distance(ours[module], expected[module]) for module in ours) <= bar


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_ranks_and_targets_may_differ_and_the_sum_of_edits_is_exact(
    method, tiny, adapters, tmp_path
):
    settings = {
        "r": 7,
        "lora_alpha": 9,
        "target_modules": r".*layers\.[02]\.self_attn\.(q_proj|o_proj)",
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3},
    }
    more = read_adapter(make(tiny("llama"), tmp_path / "more", 5, **settings))
    weights = {"law": 0.5, "more": 2.0}
    adapters = adapters | {"more": more}
    combined = combine(adapters, weights, method, Options(rank=11))
    ours, parts = edits(combined), {name: edits(adapters[name]) for name in weights}
    assert set(ours) == set(parts["law"]) | set(parts["more"])
    for module, edit in ours.items():
        terms = [weights[name] * part[module] for name, part in parts.items() if module in part]
        assert distance(edit, sum(terms)) <= SAME
    assert combined.config["rank_pattern"] or method == "svd"


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_factors_of_lower_rank_are_padded(method, tiny, adapters, tmp_path):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    small = read_adapter(make(tiny("llama"), tmp_path / "small", 6, **settings))
    combined = combine({**adapters, "small": small}, {"law": 1.0, "small": 1.0}, method)
    assert combined.config["r"] == 4
    alone = edits(combine({"small": small}, {"small": 1.0}, "linear"))
    for module, edit in edits(small).items():
        assert distance(alone[module], edit) <= SAME


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_pruning_follows_the_seed(method, adapters):
    one, again, other = (
        edits(combine(adapters, WEIGHTS, method, Options(seed=seed))) for seed in (0, 0, 1)
    )
    for module, edit in one.items():
        assert np.array_equal(edit, again[module])
        assert not np.array_equal(edit, other[module])


def test_dare_keeps_the_share_that_it_should_and_the_mean(adapters):
    weights = {"law": 1.0}
    keys = [key for key in adapters["law"].tensors if "q_proj" in key]
    whole = combine(adapters, weights, "linear").tensors
    density, kept, total = 0.3, 0, 0
    sums = {key: np.zeros(whole[key].shape) for key in keys}
    draws = 200
    for seed in range(draws):
        options = Options(density=density, seed=seed)
        tensors = combine(adapters, weights, "dare_linear", options).tensors
        for key in keys:
            sums[key] += tensors[key]
            kept += np.count_nonzero(tensors[key])
            total += tensors[key].size
            survived = tensors[key] != 0
            np.testing.assert_allclose(
                tensors[key][survived], whole[key][survived] / density, rtol=SAME
            )
    # Four standard deviations of a share, and of the mean of draws.
    assert abs(kept / total - density) <= 4 * np.sqrt(density * (1 - density) / total)
    spread = np.sqrt((1 - density) / density / draws)
    for key in keys:
        error = np.linalg.norm(sums[key] / draws - whole[key]) / np.linalg.norm(whole[key])
        assert error <= 2 * spread


@pytest.mark.parametrize("options", [{"rank": -1}, {"density": 0.0}, {"majority": "most"}])
def test_options_without_meaning_are_rejected(options):
    with pytest.raises(JaxtuneError, match=next(iter(options))):
        Options(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, 'adapter "law" is DoRA: only LoRA'),
        ({"peft_type": "IA3"}, 'adapter "law" is IA3: only LoRA'),
        ({"modules_to_save": ["lm_head"]}, r'"law" has modules_to_save=.* cannot be combined'),
        ({"trainable_token_indices": [3]}, r'"law" has trainable_token_indices=\[3\]'),
    ],
)
def test_adapters_other_than_plain_lora_are_rejected(change, message, adapters):
    law = adapters["law"]
    changed = adapters | {"law": law._replace(config=law.config | change)}
    with pytest.raises(JaxtuneError, match=message):
        combine(changed, WEIGHTS, "cat")


def test_unknown_names_are_refused_with_the_closest(adapters):
    with pytest.raises(JaxtuneError, match=r'adapter="lwa" is unknown; did you mean "law"'):
        combine(adapters, {"lwa": 1.0})
    with pytest.raises(JaxtuneError, match=r'combine="tie" is unknown; did you mean "ties"'):
        combine(adapters, WEIGHTS, "tie")
    with pytest.raises(JaxtuneError, match="no adapters to combine"):
        combine(adapters, {})


def test_adapters_of_different_bases_are_refused(tiny, adapters, tmp_path):
    wide = tiny("llama", hidden_size=96)
    other = read_adapter(make(wide, tmp_path / "other", **SETTINGS["law"]))
    with pytest.raises(JaxtuneError, match="they belong to different base models"):
        combine({**adapters, "other": other}, {"law": 1.0, "other": 1.0}, "cat")
