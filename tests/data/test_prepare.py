"""Long rows, bad rows and kept data: each is counted, named or the same as before."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from loading import load_examples

from jaxtune.chats.template import ChatTemplate, read_template
from jaxtune.chats.tokens import tokenize
from jaxtune.data import IGNORE
from jaxtune.data.encode import Encoder, Problem
from jaxtune.data.file_formats import Record
from jaxtune.data.settings import DataSettings
from jaxtune.errors import JaxtuneError


def chat(question, answer):
    turns = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def load(path, tokenizer, **settings):
    options = {"max_length": 512, "chat_template": "deepseek-v3", "progress": False}
    return load_examples(path, tokenizer=tokenizer, **(options | settings))


def tokenized(length, learned=None):
    ids = list(range(1, length + 1))
    labels = [i if learned is None or i in learned else IGNORE for i in ids]
    return {"input_ids": ids, "labels": labels}


def test_windows_learn_every_target_once(jsonl):
    path = jsonl(tokenized(11), tokenized(3), tokenized(9, learned={2, 9}))
    examples = load(path, None, max_length=4, too_long="windows")
    assert [tokens.tolist() for tokens in examples.tokens] == [
        *([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]),
        [1, 2, 3],
        *([1, 2, 3, 4], [5, 6, 7, 8]),  # the last window, [9], has nothing to train on
    ]
    pairs = [
        (t, int(y))
        for tokens, targets in zip(examples.tokens[:3], examples.targets[:3], strict=True)
        for t, y in zip(tokens.tolist(), targets, strict=True)
    ]
    assert pairs == [*((i, i + 1) for i in range(1, 11)), (11, IGNORE)]
    assert [y.tolist() for y in examples.targets[4:]] == [[2, *[IGNORE] * 3], [*[IGNORE] * 3, 9]]
    assert (examples.windows, examples.truncated, examples.dropped) == (5, 0, 0)
    assert examples.duplicates == 0
    assert examples.places[:3] == [f"{path}:1"] * 3


def test_the_start_can_be_cut_off(jsonl):
    path = jsonl(tokenized(6, learned={5, 6}), tokenized(2))
    examples = load(path, None, max_length=3, too_long="truncate_start")
    assert examples.tokens[0].tolist() == [4, 5, 6]
    assert examples.targets[0].tolist() == [5, 6, IGNORE]
    assert (examples.truncated, examples.windows) == (1, 0)


def test_a_row_of_a_hundred_thousand_tokens_passes_unharmed(deepseek, jsonl):
    words = "名 naïve 🎉 שלום def f(x):\n\treturn 'مرحبا' 👩‍🚀 "
    text = words * 5000
    path = jsonl({"text": text}, {"text": "short"})
    whole = load(path, deepseek, max_length=10**6)
    assert len(whole.tokens[0]) > 100_000
    assert deepseek.decode(whole.tokens[0][:-1], skip_special_tokens=True) == text
    cut = load(path, deepseek, max_length=1000, too_long="windows")
    joined = np.concatenate([cut.tokens[i] for i in range(cut.windows)])
    # EOS begins a window of its own, which would learn nothing: it is the last one's target.
    np.testing.assert_array_equal(joined, whole.tokens[0][:-1])
    assert cut.targets[cut.windows - 1][-1] == whole.tokens[0][-1] == deepseek.eos_token_id


def test_targets_are_those_of_the_offsets(deepseek):
    """The library's offsets, of every token, say which have a character of the answer."""
    letters = "ab 名🎉\n é👩‍🚀'שx𠮷1"
    rng, template = random.Random(0), read_template("deepseek-v3")
    for _ in range(200):
        words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(4)]
        text = "".join(words)
        start, stop = len(words[0]), len(words[0]) + len(words[1])
        encoded = deepseek(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        expected = [
            token if a < stop and b > start and b > a else IGNORE
            for token, (a, b) in zip(encoded["input_ids"], offsets, strict=True)
        ]
        found = tokenize(deepseek, text, [(start, stop)], complete=False)
        assert list(found.labels) == expected, text
    assert ChatTemplate(deepseek, template).exists()


def malformed():
    """A hundred files' contents, and what the error of each says."""
    message = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    bad = [
        (b'{"text": "a"', "invalid JSON"),
        (b'{"text": "a",}', "invalid JSON"),
        (b"{'text': 'a'}", "invalid JSON"),
        (b'{"text": "a"} {"text": "b"}', "invalid JSON"),
        (b'{"text": "\x00"}', "invalid JSON"),
        (b'{"text": "tab\there"}', "invalid JSON"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'\xff\xfe{"text": "a"}', "not UTF-8"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-8|broken"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "an unpaired surrogate"),
        (b'{"text": NaN}', "NaN is not allowed"),
        (b'{"text": "a", "text": "b"}', 'duplicate key "text"'),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
        (b'{"text": ' + b"9" * 6000 + b"}", "invalid JSON"),
        (b"text,more\nx,y", "invalid JSON"),
        (b"<html></html>", "invalid JSON"),
        (b"PK\x03\x04\x00\x00\xff", "not UTF-8|broken"),
        (b"\x00" * 1000, "invalid JSON"),
    ]
    for value in ("1", '"text"', "null", "true", "[]", '[{"text": "a"}]', "1.5", "-0"):
        bad.append((value.encode(), "expected one JSON object per line"))
    wrong = ({}, [], 1, 1.5, True, ["a"])
    bad += [(json.dumps({"text": value}).encode(), "text must be a string") for value in wrong]
    bad += [
        (json.dumps({"prompt": value, "completion": "b"}).encode(), "prompt must be a string")
        for value in wrong
    ]
    bad += [
        (json.dumps({"instruction": "a", "output": value}).encode(), "output must be a string")
        for value in wrong
    ]
    bad += [
        (json.dumps({"messages": value}).encode(), "messages must be a list|must be an object")
        for value in ({}, [], 1, "a", True, ["a"], [1], [None], [[]])
    ]
    bad += [
        (json.dumps({"messages": [message, {**answer, **change}]}).encode(), reason)
        for change, reason in (
            ({"content": ""}, "empty assistant turn"),
            ({"content": " \n"}, "empty assistant turn"),
            ({"content": None}, 'has no key "content"'),
            ({"content": 5}, "must be a string"),
            ({"content": [5]}, "only text"),
            ({"content": [{"type": "image"}]}, "has type image; only text"),
            ({"content": [{"type": "text"}]}, "must be a string"),
            ({"role": None}, 'has no key "role"'),
            ({"role": 5}, "is unknown"),
            ({"role": "asistant"}, 'did you mean "assistant"'),
            ({"role": "user"}, "no assistant turn"),
            ({"rôle": "x"}, 'has an unknown key "rôle"'),
            ({"tool_calls": "f()"}, "tool_calls must be a list"),
            ({"tool_calls": [5]}, "must have a function"),
            ({"tool_calls": [{}]}, "must have a function"),
            ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments: invalid JSON"),
            ({"tool_calls": [{"name": "f", "arguments": []}]}, "must be a JSON object"),
            ({"tool_calls": [{"name": 5, "arguments": {}}]}, "must be a string"),
            ({"reasoning_content": 5}, "must be a string"),
            ({"train": 2}, "may have either train"),
        )
    ]
    bad += [
        (json.dumps({"conversations": value}).encode(), reason)
        for value, reason in (
            ("a", "must be a list of objects"),
            ([], "one or more turns"),
            ([1], "must be a list of objects"),
            ([{"from": "human"}], 'has no key "value"'),
            ([{"value": "a"}], 'has no key "from"'),
            ([{"from": "humann", "value": "a"}], 'did you mean "human"'),
            ([{"from": ["human"], "value": "a"}], "is unknown"),
            ([{"from": "human", "value": "a"}], "no assistant turn"),
            ([{"from": "gpt", "value": "a"}], "without a prompt"),
            ([{"from": "function_call", "value": "f()"}], "function call: invalid JSON"),
        )
    ]
    bad += [
        (json.dumps(row).encode(), reason)
        for row, reason in (
            ({"text": ""}, "empty text"),
            ({"text": " \n\t"}, "empty text"),
            ({"prompt": "a", "completion": ""}, "empty completion"),
            ({"prompt": [message], "completion": "a"}, "prompt must be a string"),
            ({"txet": "a"}, 'did you mean "text"'),
            ({"messages": [message, answer], "tools": "f"}, "tools must be a list"),
            ({"messages": [message, answer], "tools": [5]}, "tools must be a list of JSON schemas"),
            ({"instruction": "a"}, "match no known format"),
            ({"instruction": "", "input": 5, "output": "a"}, "input must be a string"),
            ({"input_ids": "1 2", "labels": [1, 2]}, "list of integers"),
            ({"input_ids": [1, 2], "labels": [1]}, "differ in length: 2 and 1"),
            ({"input_ids": [1, -5], "labels": [1, 2]}, "contains -5"),
            ({"input_ids": [1, 2], "labels": [1, 10**25]}, "contains 1000000"),
            ({"input_ids": [1, 2], "labels": None}, "match no known format"),
            ({"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}, "nothing to train on"),
            ({"text": "a", "prompt": "b", "completion": "c"}, "match several formats"),
            ({"text": "word " * 2000}, "tokens exceed data.max_length=512"),
            ({"messages": [answer, message]}, "without a prompt"),
            ({"messages": [message] * 3}, "no assistant turn"),
            ({"messages": [{"role": "tool", "content": "x"}, answer]}, "cannot stand here"),
            (
                {"messages": [message, {"role": "tool", "content": "x"}, answer]},
                "cannot stand here",
            ),
            ({"messages": [message, answer, {"role": "system", "content": "x"}]}, "cannot stand"),
        )
    ]
    return bad


@pytest.mark.parametrize("depth", [10, 90, 100, 300, 950, 980, 3000, 100_000])
def test_nesting_of_any_depth_is_read_or_refused(deepseek, tmp_path, depth):
    call = '{"name": "f", "arguments": {"x": ' + "[" * depth + "]" * depth + "}}"
    turns = '{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [' + call + "]}"
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": [' + turns + "]}\n")
    if depth < 100:
        assert len(load(path, deepseek, max_length=10**6)) == 1
    else:
        with pytest.raises(JaxtuneError, match=r"x\.jsonl:1: JSON is nested too deeply"):
            load(path, deepseek, max_length=10**6)


def test_there_are_a_hundred_malformed_files():
    assert len(malformed()) >= 100


@pytest.mark.parametrize("index", range(len(malformed())))
def test_a_malformed_file_is_one_line_that_names_the_row(deepseek, tmp_path, index):
    content, reason = malformed()[index]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content + b"\n")
    with pytest.raises(JaxtuneError, match=reason) as caught:
        load(path, deepseek, vocab_size=200_000)
    assert str(caught.value).startswith(f"{path}:1: ")
    assert "\n" not in str(caught.value)


def test_bad_rows_are_skipped_up_to_a_limit_and_named(deepseek, tmp_path, caplog):
    lines = [json.dumps({"text": "good"}).encode()]
    # A row that is only too long is not among the bad ones.
    bad = [content for content, reason in malformed() if "max_length" not in reason]
    lines += [content for content in bad if b"\n" not in content]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join([lines[1], *lines, lines[0]]) + b"\n")
    examples = load(path, deepseek, bad_rows="skip", bad_rows_limit=1000)
    assert len(examples) == 2
    assert sum(examples.rejected.values()) == len(lines)
    named = [
        record.message for record in caplog.records if record.message.startswith("skipped row: ")
    ]
    assert len(named) == len(lines)
    assert named[0].startswith(f"skipped row: {path}:1: invalid JSON")
    with pytest.raises(JaxtuneError, match=r"x\.jsonl:\d+: .*data\.bad_rows_limit=3 rows are bad"):
        load(path, deepseek, bad_rows="skip", bad_rows_limit=3)
    with pytest.raises(JaxtuneError, match=r"x\.jsonl:1: invalid JSON"):
        load(path, deepseek)


def test_a_long_row_does_not_count_as_bad(deepseek, jsonl):
    path = jsonl({"text": "a"}, {"text": "a b c d e f g h"})
    with pytest.raises(JaxtuneError, match=r":2: .* tokens exceed data\.max_length=4"):
        load(path, deepseek, max_length=4, bad_rows="skip")


def test_problems_are_collected_where_somebody_asks_for_them(deepseek, jsonl):
    problems: list[Problem] = []
    path = jsonl({"text": "a"}, "{", {"text": ""}, {"text": "a b c d e f g h"})
    examples = load(path, deepseek, max_length=4, problems=problems)
    assert len(examples) == 1
    assert [(problem.place, problem.long) for problem in problems] == [
        *((f"{path}:2", False), (f"{path}:3", False), (f"{path}:4", True)),
    ]
    assert problems[1].reason == "empty text, nothing to train on"
    with pytest.raises(JaxtuneError, match=r"no examples: all 1 rows are bad, e.g.: empty text"):
        load(jsonl({"text": ""}), deepseek, problems=[])


def test_a_line_without_end_does_not_fill_the_memory(deepseek, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.data.file_formats.MAX_LINE", 1 << 20)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * (5 << 20) + b'"}\n{"text": "b"}\n')
    with pytest.raises(JaxtuneError, match=r"x\.jsonl:1: line is longer than 1 MiB"):
        load(path, deepseek)
    examples = load(path, deepseek, bad_rows="skip")
    assert examples.places == [f"{path}:2"]


def test_sources_may_have_different_forms(deepseek, jsonl):
    paths = [
        jsonl(chat("a", "b"), chat("c", "d"), name="chats.jsonl"),
        jsonl({"text": "e"}, name="texts.jsonl"),
    ]
    examples = load(f"{paths[0]},{paths[1]}@0.5", deepseek)
    assert [tuple(part) for part in examples.parts] == [
        (str(paths[0]), "messages", 2, 1.0),
        (str(paths[1]), "text", 1, 0.5),
    ]
    assert examples.places == [f"{paths[0]}:1", f"{paths[0]}:2", f"{paths[1]}:1"]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A file of 700 rows, several chunks, one of them bad."""
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    rng = random.Random(0)
    lines = [
        json.dumps(chat(f"问 {i}", "word " * rng.randint(1, 60)), ensure_ascii=False)
        for i in range(700)
    ]
    lines[300] = "{}"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_kept_data_are_the_same_and_are_used(deepseek, many, tmp_path, caplog):
    caplog.set_level("INFO", logger="jaxtune")
    settings = {"bad_rows": "skip", "cache": tmp_path, "keep": True}
    plain = load(many, deepseek, bad_rows="skip")
    kept = load(many, deepseek, **settings)
    assert "using the tokenized data" not in caplog.text
    again = load(many, deepseek, bad_rows="skip", cache=tmp_path)
    assert "using the tokenized data" in caplog.text
    assert plain.fingerprint() == kept.fingerprint() == again.fingerprint()
    for other in (kept, again):
        assert other.places == plain.places
        assert other.contents.tolist() == plain.contents.tolist()
        assert other.rejected == plain.rejected
        assert other.parts == plain.parts
    flat = again.tokens.flat
    while flat.base is not None and not isinstance(flat, np.memmap):
        flat = flat.base
    assert isinstance(flat, np.memmap), "kept data are mapped, not read"


@pytest.mark.parametrize(
    "change",
    [
        *({"max_length": 400}, {"targets": "last"}, {"chat_template": "deepseek-llm"}),
        *({"reasoning": "drop"}, {"too_long": "drop"}, {"vocab_size": 200_000}),
    ],
)
def test_other_settings_do_not_use_what_is_kept(deepseek, many, tmp_path, change, caplog):
    caplog.set_level("INFO", logger="jaxtune")
    settings = {"bad_rows": "skip", "cache": tmp_path, "keep": True}
    load(many, deepseek, **settings)
    load(many, deepseek, **(settings | change))
    assert "using the tokenized data" not in caplog.text


def test_a_changed_file_or_tokenizer_does_not_use_what_is_kept(
    deepseek, chatml, jsonl, tmp_path, caplog
):
    caplog.set_level("INFO", logger="jaxtune")
    settings = {"cache": tmp_path / "cache", "keep": True}
    load(jsonl(chat("a", "b")), deepseek, **settings)
    path = jsonl(chat("a", "c"))
    changed = load(path, deepseek, **settings)
    assert deepseek.decode(changed.tokens[0]).endswith("c<｜end▁of▁sentence｜>")
    load(path, chatml, **settings)
    assert "using the tokenized data" not in caplog.text


def test_what_is_damaged_while_it_is_made_is_not_used(deepseek, jsonl, tmp_path):
    """A process that dies leaves a directory that no key names."""
    path, cache = jsonl(chat("a", "b"), "{"), tmp_path / "cache"
    with pytest.raises(JaxtuneError):
        load(path, deepseek, cache=cache, keep=True)
    assert list(cache.iterdir()) == []


def test_damaged_kept_data_are_named(deepseek, jsonl, tmp_path):
    path, settings = jsonl(chat("a", "b")), {"cache": tmp_path / "cache", "keep": True}
    load(path, deepseek, **settings)
    (kept,) = (tmp_path / "cache").iterdir()
    for name in ("tokens.int32", "index.npz", "meta.json"):
        content = (kept / name).read_bytes()
        (kept / name).write_bytes(content[:-9])
        with pytest.raises(JaxtuneError, match=f"{kept}: damaged cache, remove it"):
            load(path, deepseek, **settings)
        (kept / name).write_bytes(content)
    # Without its last file it is as good as not there, and is made again.
    (kept / "meta.json").unlink()
    assert len(load(path, deepseek, **settings)) == 1
    assert (kept / "meta.json").is_file()


SPECIMENS = [
    {**chat("q", "a"), "tools": [{"type": "function", "function": {"name": "q"}}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"x": 1}}}],
            },
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "f"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "train": True},
        ]
    },
    {"prompt": "q", "completion": "a"},
    {"prompt": chat("q", "a")["messages"], "completion": [{"role": "assistant", "content": "b"}]},
    {"instruction": "q", "input": "i", "output": "a", "system": "s"},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a", "weight": 1},
        ],
        "system": "s",
    },
    {"text": "t"},
    {"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 1]},
]
JUNK = [
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    "",
    " ",
    "x",
    "\x00",
    "{prompt}",
    [],
    {},
    [[]],
    [{}],
    [None],
]
JUNK += [
    {"role": "assistant"},
    {"x": None},
    ["x", 1],
    [{"name": "f"}],
    "🎉" * 9,
    "</think>",
    "\r\n",
]


def spoil(value, draw):
    """Returns a row with one of its parts replaced, taken away, named otherwise or doubled."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.2:
            return {**value, draw.choice(["x", "content", "weight", "tool_calls"]): value[key]}
        return {**value, key: spoil(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        index = draw.randrange(len(value))
        return [*value[:index], spoil(value[index], draw), *value[index + draw.randint(0, 1) :]]
    return draw.choice(JUNK)


@pytest.mark.parametrize("reasoning", ["keep", "drop"])
def test_spoilt_rows_are_refused_and_nothing_crashes(deepseek, tmp_path, reasoning):
    draw, path, refused = random.Random(0), tmp_path / "x.jsonl", 0
    (tmp_path / "wordings.txt").write_text("Say: {prompt}\n")
    settings = {"reasoning": reasoning, "prompt_templates": str(tmp_path / "wordings.txt")}
    encoder = Encoder(
        DataSettings(max_length=512, chat_template="deepseek-v3", **settings), deepseek
    )
    for _ in range(1500):
        row = spoil(draw.choice(SPECIMENS), draw)
        record = Record(f"{path}:", 1, json.dumps(row).encode())
        chunk = encoder([record], encoder.detect_format(record), record.place)
        assert len(chunk.lengths) + len(chunk.problems) == 1
        refused += len(chunk.problems)
        assert all("\n" not in problem.message for problem in chunk.problems)
    assert 500 < refused < 1500


@pytest.mark.slow
def test_several_processes_make_what_one_makes(deepseek, many):
    one, two = (load(many, deepseek, bad_rows="skip", workers=count) for count in (1, 2))
    assert one.fingerprint() == two.fingerprint()
    assert one.places == two.places
    assert one.rejected == two.rejected
    with pytest.raises(JaxtuneError, match=r"rows\.jsonl:301: the keys none match no known format"):
        load(many, deepseek, workers=2)


@pytest.mark.slow
def test_memory_does_not_follow_the_size_of_the_file(deepseek, tmp_path):
    """Eight times the rows take no more than a few MiB of anonymous memory more."""
    deepseek.save_pretrained(tmp_path / "tokenizer")
    script = """
import json, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from jaxtune.data import DataSettings, load_examples
settings = DataSettings(max_length=2048)
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
load_examples(sys.argv[2], settings, tokenizer=tokenizer)  # whatever is loaded once
before, examples = anonymous(), load_examples(sys.argv[3], settings, tokenizer=tokenizer)
print(json.dumps([examples.token_count, anonymous() - before]))
"""
    text = "Some words about nothing in particular, again and again. " * 40
    for name, rows in (("small", 500), ("large", 4000)):
        lines = (json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(rows))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("small", "large")]
    command = [sys.executable, "-c", script, str(tmp_path / "tokenizer"), *files]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tokens, grown = json.loads(output.splitlines()[-1])
    # Tokens and targets alone are 8 bytes a token, and Python's own lists would be five times that.
    assert tokens > 1_500_000
    assert grown < 8, f"{grown:.1f} MiB"
