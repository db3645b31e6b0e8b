"""Rows as other tools have them: read where they say the same, otherwise told for what they are."""

from __future__ import annotations

import pytest
from loading import load_examples

from jaxtune.errors import JaxtuneError

PAIR = {"instruction": "Now?", "output": "c"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def load(jsonl, tokenizer, *rows, **settings):
    options = {"max_length": 64, "chat_template": "deepseek-v3", "progress": False}
    return load_examples(jsonl(*rows), tokenizer=tokenizer, **(options | settings))


@pytest.mark.parametrize("targets", ["all", "last"])
def test_answers_in_the_history_of_an_alpaca_row_are_targets(deepseek, jsonl, targets):
    """LLaMA-Factory learns these turns, too."""
    said = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    said += [("user", "Now?\n\nx"), ("assistant", "c")]
    turns = [{"role": role, "content": content} for role, content in [("system", "s"), *said]]
    row = {**PAIR, "input": "x", "system": "s", "history": [["q", "a"], ["r", "b"]]}
    found = load(jsonl, deepseek, row, targets=targets)
    expected = load(jsonl, deepseek, {"messages": turns}, targets=targets)
    assert found.fingerprint() == expected.fingerprint()
    assert found.contents.tolist() == expected.contents.tolist()
    assert found.unread == ()


def test_a_table_of_a_program_has_history_as_json_and_a_column_without_a_name(deepseek, tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(',instruction,output,history\n0,Q,A,"[[""q"", ""a""]]"\n1,Q,A,\n')
    found = load_examples(path, tokenizer=deepseek, max_length=99, chat_template="deepseek-v3")
    assert found.unread == ("(unnamed column)",)
    lengths = found.lengths.tolist()
    assert len(lengths) == 2 and lengths[0] > lengths[1]


@pytest.mark.parametrize("history", [None, []])
def test_an_empty_history_is_none(deepseek, jsonl, history):
    found = load(jsonl, deepseek, {**PAIR, "history": history})
    assert found.fingerprint() == load(jsonl, deepseek, PAIR).fingerprint()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "history": "q a"}, r"history must be a list of \[question, answer\] pairs"),
        ({**PAIR, "history": [["q"]]}, "history must be a list of"),
        ({**PAIR, "history": [["q", 5]]}, r"history\[0\] must be a string, not int"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "chosen and rejected are preference pairs for DPO, which jaxtune does not support; "
            "keep only the good answers, in one of the formats messages, ",
        ),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, "preference pairs for DPO"),
        ({**CHAT, "chosen": [], "rejected": []}, "set data.format=messages to train on mess"),
        ({"prompt": "q", "completion": "a", "label": False}, "label is a preference label for KTO"),
        ({**CHAT, "kto_tag": True}, "kto_tag is a preference label for KTO"),
        ({**CHAT, "images": ["a.png"]}, 'the row has "images"; remove the key'),
        (
            {"conversations": CHAT["messages"], "image": "a.png"},
            'but the row has "image"',
        ),
        ({**CHAT, "audios": [{"path": "a.wav"}]}, 'the row has "audios"'),
        (
            {"q": "x", "a": "y"},
            "the keys q, a match no known format .*; rename the keys",
        ),
        ({"question": "x", "answer": "y"}, "known: messages .*, alpaca .instruction . output"),
    ],
)
def test_unsupported_rows_raise_specific_errors(deepseek, jsonl, row, reason):
    with pytest.raises(JaxtuneError, match=rf"rows\.jsonl:1: .*{reason}"):
        load(jsonl, deepseek, row)


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({**CHAT, "chosen": "a", "rejected": "b"}, "messages"),
        ({"prompt": "q", "completion": "a", "label": True}, "prompt-completion"),
        ({**CHAT, "images": [], "image": None, "label": 1, "rejected": None}, ""),
        ({"text": "a", "label": True}, ""),
    ],
)
def test_what_else_a_row_has_is_metadata_where_the_form_is_set(deepseek, jsonl, row, form):
    assert len(load(jsonl, deepseek, row, format=form)) == 1
