"""What is held out is never trained on; equal rows are told wherever they are."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from jaxtune.config import resolve
from jaxtune.data import DataReader
from jaxtune.errors import JaxtuneError


def rows(*names):
    """Pre-tokenized rows, which differ where their names do."""
    made = []
    for name in names:
        ids = [int(digit) + 1 for digit in f"{name:04d}"]
        made.append({"input_ids": ids, "labels": ids})
    return made


def splits(jsonl, train, held_out=None, **section):
    options = {"data.max_length": 8} | {f"data.{key}": value for key, value in section.items()}
    options["data.train"] = jsonl(*train)
    if held_out is not None:
        options["data.eval"] = jsonl(*held_out, name="eval.jsonl")
    config = resolve({}, [f"{key}={value}" for key, value in options.items()])
    return DataReader(config, None, None).splits()


def both_of(splits):
    return splits.train, splits.held_out


def named(examples):
    return ["".join(str(token - 1) for token in tokens) for tokens in examples.tokens]


def test_a_number_or_a_share_is_held_out(jsonl):
    data = rows(*range(200))
    for amount, count in ((1, 1), (20, 20), (0.25, 50), (199, 199)):
        train, held_out = both_of(splits(jsonl, data, eval_split=amount))
        assert (len(train), len(held_out)) == (200 - count, count)
        assert sorted(named(train) + named(held_out)) == [f"{name:04d}" for name in range(200)]
        assert named(train) == sorted(named(train))  # in the order of the file
        assert train.parts[0].count == len(train)


def test_the_choice_follows_what_rows_say_and_nothing_else(jsonl):
    names = list(range(100))
    chosen = set(named(splits(jsonl, rows(*names), eval_split=10).held_out))
    random.Random(0).shuffle(names)
    assert set(named(splits(jsonl, rows(*names), eval_split=10).held_out)) == chosen
    # More rows move only those to the other side that they push over the edge.
    more = set(named(splits(jsonl, rows(*range(110)), eval_split=10).held_out))
    assert len(chosen & more) >= 8


def test_equal_rows_are_on_one_side_whatever_else_they_carry(jsonl):
    data = [{**row, "id": index} for index, row in enumerate(rows(*list(range(50)) * 3))]
    train, held_out = both_of(splits(jsonl, data, eval_split=0.2))
    assert not set(named(train)) & set(named(held_out))
    assert (len(train), len(held_out)) == (120, 30)
    assert (train.duplicates, held_out.duplicates) == (80, 20)


def test_windows_of_a_row_are_on_one_side(jsonl):
    data = [{"input_ids": [k] * 7, "labels": [k] * 7} for k in range(1, 31)]
    settings = {"max_length": 3, "too_long": "windows"}
    train, held_out = both_of(splits(jsonl, data, eval_split=6, **settings))
    assert train.windows == 60  # two of each row's have a target
    assert len(held_out) == 12
    sides = [{int(tokens[0]) for tokens in side.tokens} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert (train.duplicates, held_out.duplicates) == (0, 0)


@pytest.mark.parametrize("amount", [1.5, 3, 4, 0.1])
def test_a_split_that_leaves_nothing_is_refused(jsonl, amount):
    with pytest.raises(JaxtuneError, match=r"data\.eval_split"):
        splits(jsonl, rows(1, 2, 3), eval_split=amount)


def test_overlap_is_an_error_that_names_both_places(jsonl):
    with pytest.raises(JaxtuneError) as caught:
        splits(jsonl, rows(1, 2, 3, 2), rows(7, 2))
    message = str(caught.value)
    assert message.startswith("2 of 4 training examples are also held out, e.g. ")
    assert "rows.jsonl:2 and " in message and "eval.jsonl:2; set data.overlap to drop" in message


def test_overlap_can_be_dropped_or_kept(jsonl, caplog):
    train, held_out = both_of(splits(jsonl, rows(1, 2, 3, 2), rows(7, 2), overlap="drop"))
    assert named(train) == ["0001", "0003"]
    assert named(held_out) == ["0007", "0002"]
    assert "2 of 4 training examples are also held out" in caplog.text
    assert len(splits(jsonl, rows(1, 2, 3, 2), rows(7, 2), overlap="keep").train) == 4
    with pytest.raises(JaxtuneError, match="leaves no training examples"):
        splits(jsonl, rows(1), rows(1), overlap="drop")


def test_overlap_is_seen_through_form_and_wording(deepseek, jsonl, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    other = {"instruction": "q", "output": "a"}
    (tmp_path / "wordings.txt").write_text("Please: {prompt}\n")
    overrides = {
        "data.train": jsonl({"messages": turns}),
        "data.eval": jsonl(other, name="eval.jsonl"),
        "data.chat_template": "deepseek-v3",
        "data.prompt_templates": tmp_path / "wordings.txt",
    }
    config = resolve({}, [f"{key}={value}" for key, value in overrides.items()])
    with pytest.raises(JaxtuneError, match="1 of 1 training examples are also held out"):
        DataReader(config, deepseek, None).splits()
    config = resolve(config.to_dict(), ["data.overlap=keep"])
    train, held_out = both_of(DataReader(config, deepseek, None).splits())
    assert "Please: q" in deepseek.decode(train.tokens[0])
    assert "Please" not in deepseek.decode(held_out.tokens[0])


def test_both_ways_of_holding_out_are_refused(jsonl):
    with pytest.raises(JaxtuneError, match=r"eval_split are mutually exclusive"):
        splits(jsonl, rows(1, 2, 3), rows(4), eval_split=1)
    with pytest.raises(JaxtuneError, match=r"data\.train is empty"):
        DataReader(resolve({}, []), None, None).splits()


def test_held_out_data_take_no_weights(jsonl):
    with pytest.raises(JaxtuneError, match="has no weights"):
        path = jsonl(*rows(4), name="weighted.jsonl")
        config = resolve({}, [f"data.train={jsonl(*rows(1))}", f"data.eval={path}@2"])
        DataReader(config, None, None).splits()


def test_the_log_counts_what_was_done(jsonl, caplog):
    caplog.set_level("INFO", logger="jaxtune")
    data = [*rows(1, 1, 2), {"input_ids": [1] * 9, "labels": [1] * 9}, {}]
    text = [json.dumps(row) for row in data]
    splits(jsonl, text, bad_rows="skip", too_long="truncate")
    assert "4 examples, 20 tokens (16 targets); 0 dropped, 1 truncated" in caplog.text
    assert "1 duplicates, 1 bad rows skipped" in caplog.text
    assert "row format tokenized" in caplog.text


def test_selected_examples_keep_their_sources(jsonl, tmp_path):
    jsonl(*rows(1, 2, 3), name="a.jsonl")
    jsonl(*rows(4, 5), name="b.jsonl")
    config = resolve({}, [f"data.train={tmp_path}/a.jsonl@2,{tmp_path}/b.jsonl"])
    examples = DataReader(config, None, None).splits().train
    chosen = examples.select(np.array([0, 2, 3]))
    assert [(part.count, part.weight) for part in chosen.parts] == [(2, 2.0), (1, 1.0)]
    assert named(chosen) == ["0001", "0003", "0004"]
    assert chosen.places[-1].endswith("b.jsonl:1")
    assert [part.count for part in examples.select([4]).parts] == [1]
