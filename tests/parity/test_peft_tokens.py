"""Trained tokens: the correct rows of embedding and head in PEFT's files and merged weights."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from oracles import assert_same_logits, load_torch, random_tokens, torch_logits
from peft import PeftModel
from transformers import AutoTokenizer

import jaxtune
from jaxtune.adapters import method_from_config
from jaxtune.adapters.define import define
from jaxtune.adapters.projections.lora import Lora
from jaxtune.config import resolve

# More rows than the tokenizer has tokens, as in most checkpoints of the Qwen family.
PADDED = 272


@pytest.fixture(scope="module")
def padded(tiny, tiny_chat, tmp_path_factory):
    """A model with more rows than its tokenizer has tokens; the last tokens are 256 and 257."""

    def make(tied):
        directory = tmp_path_factory.mktemp("padded") / "model"
        changes = {"tie_word_embeddings": True} if tied else {}
        shutil.copytree(tiny("llama", vocab_size=PADDED, **changes), directory)
        for file in tiny_chat.glob("*token*"):
            shutil.copy(file, directory)
        shutil.copy(tiny_chat / "chat_template.jinja", directory)
        return directory

    return make


def trained(directory, chats, workdir, **adapter):
    config = {
        "model": {"path": str(directory)},
        "data": {"train": str(chats), "max_length": 64},
        "adapter": {"rank": 2, "targets": "q_proj"} | adapter,
        "training": {"steps": 3, "batch_size": 4, "dtype": "float32"},
        "optimizer": {"learning_rate": 1e-2},
        "evaluation": {"every": 0},
    }
    return jaxtune.train(config, workdir)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_rows_of_real_tokens_are_trained_in_embedding_and_head(tied, padded, chats, tmp_path):
    directory = padded(tied)
    named = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("a")
    run = trained(directory, chats, tmp_path / "run", new_tokens=2, train_tokens="a")
    adapter = run.adapter_directory("last")
    config = json.loads((adapter / "adapter_config.json").read_text())
    ids = [256, 257, named]
    both = {"embed_tokens": ids, "lm_head": ids}
    assert config["trainable_token_indices"] == (ids if tied else both)
    # PEFT loads the adapter and has the same logits.
    tokens = np.concatenate([random_tokens(1, 2, 16), [ids * 2, ids * 2]], axis=1)
    theirs = PeftModel.from_pretrained(load_torch(directory), adapter).eval()
    ours = run.model("last").logits(tokens)
    assert_same_logits(ours, torch_logits(theirs, tokens))
    # Merging changes exactly these rows of both weights.
    merged = load_torch(run.save_merged(tmp_path / "merged", "last"))
    assert_same_logits(torch_logits(merged, tokens), ours)
    base = load_torch(directory)
    for after, before in (
        (merged.get_input_embeddings(), base.get_input_embeddings()),
        (merged.get_output_embeddings(), base.get_output_embeddings()),
    ):
        changed = (after.weight != before.weight).any(dim=1).nonzero().flatten().tolist()
        assert changed == sorted(ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"new_tokens": 259}, r"adapter\.new_tokens=259: the tokenizer has 258 tokens"),
        ({"train_tokens": "<|im_edn|>"}, r'no token "<\|im_edn\|>"; did you mean "<\|im_end\|>"'),
        (
            {"new_tokens": 2},
            r"adapter\.new_tokens: token 257 has no row in the model, which has 160",
        ),
    ],
)
def test_rows_that_no_token_has_are_refused(settings, message, tiny, tiny_chat):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    config = json.loads((tiny("llama") / "config.json").read_text())
    with pytest.raises(jaxtune.JaxtuneError, match=message):
        method = method_from_config(resolve({"adapter": settings}).adapter)
        define(config, "float32", method.with_tokenizer(tokenizer))


def test_tokens_need_a_tokenizer():
    with pytest.raises(jaxtune.JaxtuneError, match=r"adapter\.new_tokens .* need the tokenizer"):
        Lora(new_tokens=1).with_tokenizer(None)
