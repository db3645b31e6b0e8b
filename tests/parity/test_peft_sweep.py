"""Configurations of PEFT's own tests: each adapter has PEFT's logits or is refused by name.

Adapters are merged into the weights without jit, and the merged model runs through one compiled
function for each architecture, so that a case needs no compilation.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracles import LOGITS, load_torch, random_tokens, relative, torch_logits
from peft import LoraConfig, get_peft_model
from peft_cases import CASES, EVERYWHERE, settings_for

import jaxtune
from jaxtune.adapter_files.peft import read_adapter
from jaxtune.adapter_files.settings import ALWAYS, KINDS, TARGETS, VALID, check_settings
from jaxtune.adapters.merge import edits
from jaxtune.api import Model
from jaxtune.checkpoints.huggingface import checkpoint_tensors, open_source
from jaxtune.checkpoints.load_model import attach_adapter, load_model
from jaxtune.errors import JaxtuneError
from jaxtune.layers.tree import layer_names, merge, unflatten
from jaxtune.parallel.mesh import single_device_mesh

TOKENS = random_tokens(1, 2, 24)
BASES = ("llama", "qwen2", "deepseek_v3", "tied")
# Architectures for which the quick tests try a part of the configurations.
SPARSE = ("qwen2", "deepseek_v3")


class Base:
    """A tiny model, loaded once by both programs."""

    def __init__(self, directory, name=""):
        self.directory, self.name = directory, name
        self.source = open_source(directory)
        self.torch = load_torch(directory)
        mesh = single_device_mesh()
        self.bare = load_model(self.source, "float32", mesh, progress=False)
        self.plain = torch_logits(self.torch, TOKENS)

    def theirs(self, config, target):
        """Makes an adapter with random values with PEFT; returns PEFT's logits [B, T, V]."""
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(self.torch), config).eval()
        with torch.no_grad():
            for value in (v for v in model.parameters() if v.requires_grad):
                value.add_(0.2 * torch.randn_like(value))
        model.save_pretrained(target)
        return torch_logits(model, TOKENS)[:, -TOKENS.shape[1] :]

    def ours(self, directory):
        """Returns jaxtune's logits with an adapter, merged into the weights if that is possible."""
        parts = attach_adapter(self.bare, self.source, "float32", read_adapter(directory))
        if not parts.method.can_merge:
            return self._logits(parts)
        trees = parts.base, parts.trainable, parts.constants
        with jax.disable_jit():  # many shapes occur once each
            found = edits(parts.definition.bind(*trees))
            merged = dict(checkpoint_tensors(parts.definition, merge(*trees), "float32", found))
        stacked = {
            path: self._stacked(path, leaf.declaration, merged)
            for path, leaf in self.bare.definition.leaves.items()
        }
        return self._logits(self.bare._replace(base=unflatten(stacked)))

    def _stacked(self, path, declared, merged):
        values = [merged[name] for name in layer_names(path, declared)]
        return jnp.asarray(np.stack(values).reshape(declared.stacked_shape))

    def _logits(self, parts):
        mesh = single_device_mesh()
        return Model(parts, self.directory, mesh, dtype="float32").logits(TOKENS)


@pytest.fixture(scope="module")
def base(request, tiny, families):
    """The base model of a name."""
    name = request.param
    if name == "tied":
        return Base(tiny("llama", tie_word_embeddings=True), name)
    return Base(families(name) if name == "deepseek_v3" else tiny(name), name)


def outcome(base, config, case, tmp_path):
    """Returns a description of the failure of a case, or None."""
    try:
        theirs = base.theirs(config, tmp_path)
    except Exception as error:
        return f"PEFT: {error}"
    try:
        ours = base.ours(tmp_path)
    except JaxtuneError as error:
        expected = case.refused and re.search(case.refused, str(error)) and "\n" not in str(error)
        return None if expected else f"refused: {error}"
    if case.refused:
        return "not refused"
    error, shows = relative(ours, theirs), relative(theirs, base.plain)
    return None if error <= LOGITS < shows else f"error {error:.1e}, change {shows:.1e}"


def test_an_adapter_of_a_resized_model_needs_a_base_of_that_size(tiny, tmp_path):
    small, grown = Base(tiny("llama")), tmp_path / "grown"
    model = load_torch(small.directory)
    model.resize_token_embeddings(164, mean_resizing=False)
    with torch.no_grad():  # the adapter stores other rows, as after training
        model.get_input_embeddings().weight[160:] = 0.5
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    message = "(embed_tokens|lm_head) has 164 rows, but 160 in the base.*resize_token_embeddings"
    with pytest.raises(JaxtuneError, match=message):
        small.ours(tmp_path / "adapter")
    other = load_torch(small.directory)
    other.resize_token_embeddings(164)
    other.save_pretrained(grown)
    tokens = np.concatenate([TOKENS, np.full((2, 1), 163)], axis=1)
    ours = jaxtune.load(grown, adapter=tmp_path / "adapter", dtype="float32", progress=False)
    assert relative(ours.logits(tokens), torch_logits(adapted, tokens)) <= LOGITS


def test_an_untied_checkpoint_takes_edits_of_the_head(tiny, tmp_path):
    tied = Base(tiny("llama", tie_word_embeddings=True))
    settings = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}
    theirs = tied.theirs(LoraConfig(task_type="CAUSAL_LM", r=2, **settings), tmp_path / "adapter")
    untied = jaxtune.convert(
        tied.directory, tmp_path / "untied", dtype="float32", untie=True, progress=False
    )
    assert relative(torch_logits(load_torch(untied), TOKENS), tied.plain) == 0
    assert relative(Base(untied).ours(tmp_path / "adapter"), theirs) <= LOGITS


CONFIGS = {
    peft.LoraConfig: {},
    peft.IA3Config: {},
    peft.VeraConfig: {},
    peft.PromptTuningConfig: {"num_virtual_tokens": 4},
    peft.PrefixTuningConfig: {"num_virtual_tokens": 4},
    peft.PromptEncoderConfig: {"num_virtual_tokens": 4},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_of_peft_is_read_or_refused(kind, tmp_path):
    kind(**CONFIGS[kind]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    check_settings(config)  # PEFT's defaults are fine
    known = KINDS[config["peft_type"]]
    fields = {field.name for field in dataclasses.fields(kind)}
    # Each setting of PEFT has a decision, also one that a new version adds; all known names are
    # names of PEFT, neither outdated nor misspelled.
    decided = known.read | known.inert | known.refused
    assert fields - ALWAYS - TARGETS == decided - TARGETS
    assert not known.refused & (known.read | known.inert)
    # Any other setting, also of future versions, is refused if it is used, and so is any value of
    # another type than PEFT's.
    for name in [*config, "new_setting"]:
        values = (True, 3, "other", {"top_k": 2}, [[0, 2]], -1, 0.5, 1e308, ["x"], 10**400)
        if name in known.read | known.inert | ALWAYS:
            assert_only_valid_values_pass(config, name, values)
            continue
        for value in values:
            with pytest.raises(JaxtuneError, match=f'"{name}"='):
                check_settings(config | {name: value})


def assert_only_valid_values_pass(config, name, values):
    valid = VALID[name]
    passed = []
    for value in values:
        try:
            check_settings(config | {name: value})
            passed.append(value)
        except JaxtuneError as error:
            assert f'"{name}"=' in str(error) and str(error).endswith(f" is not {valid.text}")
            assert len(str(error)) < 200
    checked_elsewhere = {"peft_type", "runtime_config", "trainable_token_indices"}
    assert name in checked_elsewhere or len(passed) < len(values)


def test_there_are_values_for_exactly_the_settings_that_may_be_used():
    used = {name for known in KINDS.values() for name in known.read | known.inert}
    assert VALID.keys() == used | ALWAYS


def cases_of(name):
    """Yields the name of each case of an architecture, the case, and whether it is quick."""
    for key, case in CASES.items():
        if name in (case.bases or BASES[:3]):
            quick = name not in SPARSE or key in EVERYWHERE or case.bases == (name,)
            yield key, case, quick


SLOW = [pytest.param(name, False, marks=pytest.mark.slow, id=f"{name}-others") for name in SPARSE]


@pytest.mark.parametrize(
    ("base", "quick"),
    [*(pytest.param(name, True, id=name) for name in BASES), *SLOW],
    indirect=["base"],
)
def test_every_configuration_is_equal_or_refused_by_name(base, quick, tmp_path):
    tried, wrong = 0, {}
    name = base.name
    for key, case, is_quick in cases_of(name):
        if is_quick != quick:
            continue
        tried += 1
        settings = {"task_type": "CAUSAL_LM"} | settings_for(name, case.settings)
        found = outcome(base, case.config(**settings), case, tmp_path / key)
        if found is not None:
            wrong[key] = found
    assert tried and not wrong, json.dumps(wrong, indent=1)
