"""Prefixes and prompts train as in PEFT, and both programs read each other's files."""

from __future__ import annotations

import json

import pytest
import torch
from oracles import (
    LOSS,
    Recipe,
    assert_same_logits,
    load_torch,
    make_examples,
    random_tokens,
    relative,
    torch_logits,
    train_torch,
)
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.numpy import load_file
from safetensors.torch import save_file
from test_training import GRAD_NORM, LENGTH, run_config, write_rows

import jaxtune
from jaxtune.adapter_files.peft import read_adapter, write_adapter
from jaxtune.adapters import method_from_peft

TOKENS = random_tokens(1, 2, 24)
N = 5
MQA = {"num_key_value_heads": 1}
PREFIXES = {
    "prefix-gqa": ("llama", {}, PrefixTuningConfig, {}),
    "prefix-mha": ("qwen3", {"num_key_value_heads": 4}, PrefixTuningConfig, {}),
    "prefix-mqa": ("qwen2", MQA, PrefixTuningConfig, {}),
    "projected-gqa": (
        "qwen2",
        {},
        PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 24},
    ),
    "projected-mqa": (
        "llama",
        MQA,
        PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 24},
    ),
}
PROMPTS = {
    "prompt": ("llama", {}, PromptTuningConfig, {}),
    "ptuning-mlp": ("qwen3", {}, PromptEncoderConfig, {"encoder_hidden_size": 24}),
    "ptuning-lstm": (
        "qwen2",
        {},
        PromptEncoderConfig,
        {"encoder_hidden_size": 24, "encoder_reparameterization_type": "LSTM"},
    ),
}
CASES = PREFIXES | PROMPTS
QUICK = ("prefix-gqa", "prompt")


class TextOnly(torch.nn.Module):
    """A model with virtual tokens that returns the logits of the text only."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, attention_mask=None):
        """Returns the output for tokens int[B, T], with logits [B, T, V]."""
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
        output = self.model(tokens, attention_mask=mask)
        output.logits = output.logits[:, -tokens.shape[1] :]
        return output


def start(directory, target, kind, settings):
    """Adds virtual tokens to a model with PEFT; saves them, and their network as jaxtune does."""
    torch.manual_seed(0)
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=N, **settings)
    model = get_peft_model(load_torch(directory), config)
    model.save_pretrained(target)
    encoder = model.prompt_encoder["default"].state_dict()
    if len(encoder) > 1:
        save_file(encoder, target / "encoder.safetensors")
    return model


def ours_on(directory, adapter):
    return jaxtune.load(directory, adapter=adapter, dtype="float32", progress=False)


@pytest.mark.parametrize(
    "case",
    [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
)
def test_training_is_that_of_peft(case, tiny, tmp_path):
    model_type, changes, kind, settings = CASES[case]
    directory, recipe = tiny(model_type, **changes), Recipe(accumulation=2)
    examples = make_examples(60, longest=LENGTH)
    model = start(directory, tmp_path / "start", kind, settings)
    method = method_from_peft(read_adapter(tmp_path / "start", encoder=True)).name
    rows = write_rows(tmp_path / "rows.jsonl", examples)
    adapter = {"method": method, "init_from": str(tmp_path / "start")}
    run = jaxtune.train(run_config(directory, rows, recipe, adapter=adapter), tmp_path / "run")
    updates = train_torch(TextOnly(model), examples, recipe)
    for ours, theirs in zip(run.metrics(), updates, strict=True):
        assert relative(ours["loss"], theirs.loss) <= LOSS
        assert relative(ours["grad_norm"], theirs.grad_norm) <= GRAD_NORM
    # Training has an effect; an untrained adapter would agree with itself.
    assert relative(updates[-1].loss, updates[0].loss) > 100 * LOSS
    # PEFT reads the files of the run, which have the settings that PEFT would write.
    last = run.adapter_directory("last")
    again = PeftModel.from_pretrained(load_torch(directory), last).eval()
    ours = ours_on(directory, last)
    assert_same_logits(ours.logits(TOKENS), torch_logits(TextOnly(again), TOKENS))
    theirs, written = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (tmp_path / "start", last)
    )
    free = {"base_model_name_or_path"}
    assert {k: v for k, v in written.items() if k not in free} == {
        k: theirs[k] for k in written if k not in free
    }
    # The network that computes the virtual tokens is stored with them.
    encoder = read_adapter(last, encoder=True).encoder
    network = model.prompt_encoder["default"].state_dict()
    assert (encoder is not None) == (len(network) > 1)
    if encoder is not None:
        assert {k: v.shape for k, v in encoder.items()} == {
            k: tuple(v.shape) for k, v in network.items()
        }


@pytest.mark.parametrize("case", CASES)
def test_peft_and_jaxtune_read_each_others_files(case, tiny, tmp_path):
    model_type, changes, kind, settings = CASES[case]
    directory = tiny(model_type, **changes)
    model = start(directory, tmp_path / "theirs", kind, settings).eval()
    expected = torch_logits(TextOnly(model), TOKENS)
    ours = ours_on(directory, tmp_path / "theirs")
    assert_same_logits(ours.logits(TOKENS), expected)
    assert relative(expected, torch_logits(load_torch(directory), TOKENS)) > 1e-2
    stored = ours.method.store(ours.definition, ours.trainable, ours.constants)
    write_adapter(tmp_path / "ours", stored)
    again = PeftModel.from_pretrained(load_torch(directory), tmp_path / "ours").eval()
    assert_same_logits(torch_logits(TextOnly(again), TOKENS), expected)
    theirs, written = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    )
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in theirs.items()}
