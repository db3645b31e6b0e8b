"""BOS and EOS are there once, wherever text becomes ids, and BOS is never learned."""

from __future__ import annotations

import json

import numpy as np
import pytest
from loading import load_examples

from jaxtune.data import IGNORE, encode_prompt, tokenize_prompt

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
ADDS = ["nothing", "bos", "eos", "bos+eos"]


def adding(tokenizer, what, **special):
    """Returns a copy of a tokenizer that adds BOS, EOS, both or nothing."""
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": BOS, "eos_token": EOS} | special
    backend = tokenizer.backend_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend.from_str(backend.to_str()),
        add_bos_token="bos" in what,
        add_eos_token="eos" in what,
        chat_template=tokenizer.chat_template,
        **special,
    )


@pytest.fixture(scope="module")
def tokenizers(chatml):
    return {what: adding(chatml, what) for what in ADDS}


def marked(tokenizer, row, tmp_path, **settings):
    """Returns a row's text as it is trained, with what is learned in ⟦ ⟧."""
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(row) + "\n")
    examples = load_examples(path, tokenizer=tokenizer, max_length=512, **settings)
    text, inside = "", False
    learned = [False, *(examples.targets[0][:-1] != IGNORE)]
    for token, target in zip(examples.tokens[0].tolist(), learned, strict=True):
        text += ("⟦" if target else "⟧") if target != inside else ""
        text, inside = text + tokenizer.decode([token]), target
    return (text + "⟧" * bool(inside)).replace(BOS, "B").replace(EOS, "E")


def chat(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


# A row, and what is trained of it by a tokenizer that adds BOS; ? is BOS where it does.
WHOLE = [
    ({"text": "Hi you"}, "?⟦Hi you E⟧"),
    ({"text": f"{BOS}Hi you"}, "B⟦Hi you E⟧"),
    ({"text": f"{BOS}Hi you{EOS}"}, "B⟦Hi you E⟧"),
    ({"text": f"{BOS}{BOS}Hi you{EOS}{EOS}"}, "B⟦Hi you E⟧"),
    ({"text": f"Hi you{EOS}\n"}, "?⟦Hi you E⟧"),
    ({"text": f"{BOS}a{EOS}{BOS}b"}, "B⟦aE⟧B⟦bE⟧"),
    ({"prompt": "Hi", "completion": " you"}, "?Hi⟦ you E⟧"),
    ({"prompt": f"{BOS}Hi", "completion": " you"}, "BHi⟦ you E⟧"),
    ({"prompt": f"{BOS}Hi", "completion": f" you{EOS}"}, "BHi⟦ you E⟧"),
    ({"prompt": "Hi", "completion": f" you{EOS}{EOS}\n\n"}, "?Hi⟦ you E⟧"),
    ({"prompt": BOS, "completion": "Hi you"}, "B⟦Hi you E⟧"),
    ({"prompt": "", "completion": f"{BOS}Hi you"}, "B⟦Hi you E⟧"),
    ({"prompt": f"a{EOS}", "completion": " b"}, "?aE⟦ bE⟧"),
    ({"prompt": f"a{EOS}", "completion": EOS}, "?a⟦E⟧"),
]


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize(("row", "expected"), WHOLE, ids=range(len(WHOLE)))
def test_texts_and_completions(tokenizers, tmp_path, adds, row, expected):
    if "bos" in adds:
        expected = expected.replace("?", "B")
    else:  # nothing comes before the first token that could predict it
        expected = expected.replace("?⟦Hi", "Hi⟦").replace("?", "")
    expected = expected.replace(" E", "E")
    assert marked(tokenizers[adds], row, tmp_path) == expected


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("template", ["deepseek-llm", "deepseek-v3", "deepseek-coder", ""])
def test_chats_have_the_special_tokens_of_their_template(tokenizers, tmp_path, adds, template):
    """Whatever the tokenizer adds by itself, and whether or not answers bring the end token."""
    tokenizer, row = tokenizers[adds], chat("q", "a", "r", "b")
    plain = marked(tokenizers["nothing"], row, tmp_path, chat_template=template)
    assert marked(tokenizer, row, tmp_path, chat_template=template) == plain
    assert plain.count("B") == (template != "")
    end = {"": "<|im_end|>", "deepseek-coder": "<|EOT|>"}.get(template, EOS)
    ended = chat("q", f"a{end}", "r", f"b{end}")
    assert marked(tokenizer, ended, tmp_path, chat_template=template) == plain
    assert plain.count(end.replace(EOS, "E") + "⟧") == plain.count("⟧") == 2


@pytest.mark.parametrize("adds", ADDS)
def test_a_rendered_chat_has_the_tokens_that_transformers_gives_it(tokenizers, templates, adds):
    """The text of `apply_chat_template` trains what its ids are, and generation begins there."""
    tokenizer = tokenizers[adds]
    turns = chat("q", "a", "r", "b")["messages"]
    for template in (templates["v2"], templates["v3"]):
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        ids = tokenizer.apply_chat_template(turns, chat_template=template)["input_ids"]
        assert text.startswith(BOS) and ids[0] == tokenizer.bos_token_id
        assert [*tokenize_prompt(tokenizer, text)] == ids
        assert (
            encode_prompt(tokenizer, turns[:1])
            == tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
        )


@pytest.mark.parametrize("adds", ADDS)
def test_a_prompt_begins_as_its_row_was_trained(tokenizers, tmp_path, adds):
    tokenizer = tokenizers[adds]
    for prompt in ("Hi", f"{BOS}Hi", f"{BOS}{BOS}Hi", "你好 🎉", ""):
        (tmp_path / "row.jsonl").write_text(json.dumps({"prompt": prompt, "completion": " you"}))
        examples = load_examples(tmp_path / "row.jsonl", tokenizer=tokenizer, max_length=64)
        asked = tokenize_prompt(tokenizer, prompt)
        assert examples.tokens[0][: len(asked)].tolist() == asked
        first = int(np.flatnonzero(examples.targets[0] != IGNORE)[0])
        assert len(asked) in (first + 1, 0)  # without BOS an empty prompt has no token
    # What a user ends himself stays ended.
    assert tokenize_prompt(tokenizer, f"Hi{EOS}")[-1] == tokenizer.eos_token_id


def test_a_token_that_is_both_bos_and_eos_is_a_target_at_the_end(chatml, tmp_path):
    tokenizer = adding(chatml, "bos", bos_token=EOS)
    assert marked(tokenizer, {"text": f"{EOS}Hi"}, tmp_path) == "E⟦HiE⟧"
    assert marked(tokenizer, {"prompt": "Hi", "completion": " a"}, tmp_path) == "EHi⟦ aE⟧"


def test_tokenized_rows_stay_as_they_are(tokenizers, tmp_path):
    ids = [0, 0, 5, 1, 1]
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps({"input_ids": ids, "labels": ids}))
    examples = load_examples(path, tokenizer=tokenizers["bos+eos"], max_length=8)
    assert examples.tokens[0].tolist() == ids
    assert examples.targets[0].tolist() == [*ids[1:], IGNORE]
