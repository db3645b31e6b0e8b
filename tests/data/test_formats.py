"""Rows of every form: the same conversation gives the same tokens, whatever it is written as."""

from __future__ import annotations

import json

import pytest
from loading import load_examples

from jaxtune.data import IGNORE
from jaxtune.errors import JaxtuneError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add.\n\n1 and 2"},
    {"role": "assistant", "content": "3"},
]
SAME = {
    "messages": {"messages": MESSAGES},
    "parts": {
        "messages": [
            *MESSAGES[:2],
            {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
        ]
    },
    "prompt-completion": {"prompt": MESSAGES[:2], "completion": MESSAGES[2:]},
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief."},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Add.\n\n1 and 2"},
            {"from": "gpt", "value": "3"},
        ],
        "system": "Be brief.",
    },
    "openai keys": {"conversations": MESSAGES},
}


def load(jsonl, tokenizer, *rows, **settings):
    options = {"max_length": 64, "chat_template": "deepseek-v3", "progress": False}
    return load_examples(jsonl(*rows), tokenizer=tokenizer, **(options | settings))


def learned(tokenizer, examples, index=0):
    """The text of an example's targets, with | between those that are not neighbours."""
    text, before = "", True
    for target in examples.targets[index]:
        if target != IGNORE:
            text += ("" if before else "|") + tokenizer.decode([int(target)])
        before = target != IGNORE or not text
    return text.replace("<｜end▁of▁sentence｜>", "#")


@pytest.mark.parametrize("form", SAME)
def test_the_same_conversation_is_the_same_example(deepseek, jsonl, form):
    expected = load(jsonl, deepseek, SAME["messages"])
    examples = load(jsonl, deepseek, SAME[form])
    assert examples.fingerprint() == expected.fingerprint()
    assert examples.contents.tolist() == expected.contents.tolist()
    assert examples.unread == ()
    assert learned(deepseek, examples) == "3#"


def test_the_format_is_logged_and_can_be_set(deepseek, jsonl, caplog):
    caplog.set_level("INFO", logger="jaxtune")
    row = {"instruction": "Say a.", "output": "a", "text": "Say a. a"}
    with pytest.raises(JaxtuneError, match=r":1: .*set data\.format to alpaca or text"):
        load(jsonl, deepseek, row)
    examples = load(jsonl, deepseek, row, format="alpaca")
    assert learned(deepseek, examples) == "a#"
    assert examples.unread == ("text",)
    assert "row format alpaca" in caplog.text
    with pytest.raises(
        JaxtuneError, match=r":1: no key .prompt. .*data\.format=prompt-completion requires"
    ):
        load(jsonl, deepseek, row, format="prompt-completion")
    with pytest.raises(JaxtuneError, match=r'data\.format="\w+" is unknown'):
        load(jsonl, deepseek, row, format="alpacca")


def test_every_token_of_a_plain_text_is_a_target_and_eos_is_added(deepseek, jsonl):
    text = "第一 first\n\n🎉 x"
    examples = load(jsonl, deepseek, {"text": text})
    ids = deepseek(text, add_special_tokens=True)["input_ids"]
    assert examples.tokens[0].tolist() == [*ids, deepseek.eos_token_id]
    assert examples.targets[0].tolist() == [*ids[1:], deepseek.eos_token_id, IGNORE]


def test_turns_of_the_prompt_are_not_targets(deepseek, jsonl):
    row = {
        "prompt": [*MESSAGES, {"role": "user", "content": "And 4?"}],
        "completion": [{"role": "assistant", "content": "7"}],
    }
    assert learned(deepseek, load(jsonl, deepseek, row)) == "7#"


def conversation(*marks):
    """Turns A, B, C of the assistant with what each says of itself."""
    turns = []
    for answer, mark in zip("ABC", marks, strict=False):
        turns += [{"role": "user", "content": "q"}]
        turns += [{"role": "assistant", "content": answer, **mark}]
    return {"messages": turns}


@pytest.mark.parametrize(
    ("targets", "marks", "expected"),
    [
        ("all", ({}, {}, {}), "A#|B#|C#"),
        ("all", ({"train": False}, {}, {"weight": 1}), "B#|C#"),
        ("all", ({"weight": 0}, {"weight": 1.0}, {"train": True}), "B#|C#"),
        ("last", ({}, {"train": True}, {}), "C#"),
        ("marked", ({}, {"train": True}, {}), "B#"),
        ("marked", ({"weight": 1}, {"train": False}, {"train": True}), "A#|C#"),
    ],
)
def test_targets_are_chosen_by_turn(deepseek, jsonl, targets, marks, expected):
    assert (
        learned(deepseek, load(jsonl, deepseek, conversation(*marks), targets=targets)) == expected
    )


@pytest.mark.parametrize(
    ("targets", "row", "reason"),
    [
        ("last", conversation({}, {"train": False}), "leave no turn to train on"),
        ("marked", conversation({}, {}), "leave no turn to train on.*data.targets=marked"),
        ("all", conversation({"train": "yes"}), r"\[1\] may have either train \(true or false\)"),
        ("all", conversation({"weight": 0.5}), r"may have either train .* or weight \(0 or 1\)"),
        ("all", conversation({"weight": 1, "train": False}), r"\[1\] may have either train"),
        (
            "all",
            {"messages": [{"role": "user", "content": "q", "train": True}, *MESSAGES[1:]]},
            r"messages\[0\] is a user turn; only assistant turns",
        ),
    ],
)
def test_marks_that_leave_nothing_or_mean_nothing_are_refused(
    deepseek, jsonl, targets, row, reason
):
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl:1: .*" + reason):
        load(jsonl, deepseek, row, targets=targets)


def test_a_first_assistant_turn_is_allowed_if_it_is_not_a_target(deepseek, jsonl):
    greeting = {"role": "assistant", "content": "Hello", "train": False}
    row = {"messages": [greeting, *MESSAGES[1:]]}
    assert learned(deepseek, load(jsonl, deepseek, row)) == "3#"


def test_reasoning_is_kept_or_dropped(deepseek, jsonl):
    rows = [
        {"messages": [MESSAGES[1], {"role": "assistant", "content": content, **more}]}
        for content, more in (
            ("<think>\nhm\n</think>\n\n3", {}),
            ("3", {"reasoning_content": "hm"}),
            ("hm\n</think>\n\n3", {}),
        )
    ]
    settings = {"chat_template": "deepseek-r1"}
    kept = load(jsonl, deepseek, *rows, **settings)
    dropped = load(jsonl, deepseek, *rows, reasoning="drop", **settings)
    for index in range(3):
        assert learned(deepseek, kept, index) == "hm\n</think>\n\n3#"
        assert learned(deepseek, dropped, index) == "</think>\n\n3#"
    only = {"messages": [MESSAGES[1], {"role": "assistant", "content": "<think>hm</think>"}]}
    with pytest.raises(JaxtuneError, match=r"messages\[1\] contains only reasoning"):
        load(jsonl, deepseek, only, reasoning="drop", **settings)
    twice = {"role": "assistant", "content": "a</think>b", "reasoning_content": "a"}
    with pytest.raises(JaxtuneError, match="both in its content and in reasoning_content"):
        load(jsonl, deepseek, {"messages": [MESSAGES[1], twice]})


def test_calls_of_both_kinds_of_file_are_the_same(deepseek, jsonl):
    call = {"name": "weather", "arguments": {"city": "北京"}}
    ours = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": call}]},
            {"role": "tool", "content": "晴", "tool_call_id": "1"},
            {"role": "assistant", "content": "Sunny"},
        ]
    }
    theirs = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "晴"},
            {"from": "gpt", "value": "Sunny"},
        ]
    }
    first, second = (load(jsonl, deepseek, row, max_length=128) for row in (ours, theirs))
    assert first.fingerprint() == second.fingerprint()
    assert learned(deepseek, first).endswith("<｜tool▁calls▁end｜>#|Sunny#")
    assert '{"city": "北京"}' in learned(deepseek, first)


def test_wordings_are_drawn_by_the_seed_and_the_row(deepseek, jsonl, tmp_path):
    wordings = tmp_path / "wordings.txt"
    wordings.write_text("{prompt}\nPlease: {prompt}\n\n{prompt}\\nNow.\n", encoding="utf-8")
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, MESSAGES[2]]} for i in range(24)]

    def prompts(seed, rows=rows):
        examples = load(jsonl, deepseek, *rows, prompt_templates=str(wordings), seed=seed)
        assert all(learned(deepseek, examples, i) == "3#" for i in range(len(rows)))
        texts = [deepseek.decode(tokens) for tokens in examples.tokens]
        return [text.split("<｜User｜>")[1].split("<｜Assistant｜>")[0] for text in texts]

    first = prompts(0)
    allowed = [{f"q{i}", f"Please: q{i}", f"q{i}\nNow."} for i in range(24)]
    assert all(text in texts for text, texts in zip(first, allowed, strict=True))
    kinds = {text.replace(f"q{i}", "q") for i, text in enumerate(first)}
    assert kinds == {"q", "Please: q", "q\nNow."}
    assert prompts(0) == first != prompts(1)
    assert prompts(0, rows[::-1]) == first[::-1]
    wordings.write_text("{prompt}\nnothing\n")
    with pytest.raises(JaxtuneError, match=r"wordings\.txt:2: .* must contain \{prompt\}"):
        prompts(0)
