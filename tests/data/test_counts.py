"""Nothing is lost in silence: the counts of rows add up, whatever is done to them."""

from __future__ import annotations

import json
import re

import pytest
from loading import load_examples

from jaxtune.config import resolve
from jaxtune.data import IGNORE, DataReader
from jaxtune.data.report import count_overlap, render_statistics, statistics
from jaxtune.errors import JaxtuneError

LIMIT = 4


def row(name, length, learned=None):
    """A row of tokens that start with its name; `learned` are positions from 0."""
    ids = [name, *range(1, length)]
    labels = [i if learned is None or t in learned else IGNORE for t, i in enumerate(ids)]
    return json.dumps({"input_ids": ids, "labels": labels})


SHORT = [row(name, 3) for name in range(10, 20)]
TWICE = [SHORT[0], SHORT[3], row(30, 9)]
LONG = [row(30, 9), row(31, 5), row(32, 8, {1, 7}), row(33, 9, {1})]
# Targets at one end alone: with the other end cut off, nothing is left to learn.
ONE_END = [row(40, 9, {8}), row(41, 9, {1})]
BAD = ["{", "[]", '{"input_ids": [1], "labels": [1]}', row(50, 3, set()), row(51, 9, set())]


def targets_of(text):
    return sum(label != IGNORE for label in json.loads(text)["labels"][1:])


def reader(**section):
    settings = [f"data.{key}={value}" for key, value in {"max_length": LIMIT, **section}.items()]
    return DataReader(resolve({}, settings), None, None)


def check(examples, lines):
    """Holds the counts to one another and to the file."""
    with_examples = len(set(examples.places))
    assert examples.rows_read == len(lines)
    assert with_examples + examples.dropped + sum(examples.rejected.values()) == len(lines)
    assert len(examples) - examples.windows + examples.windowed == with_examples
    assert sum(part.count for part in examples.parts) == len(examples)
    assert examples.duplicates == with_examples - len(set(examples.contents.tolist()))
    assert (examples.lengths <= LIMIT).all()


@pytest.mark.parametrize("too_long", ["drop", "truncate", "truncate_start", "windows"])
@pytest.mark.parametrize(
    "lines",
    [SHORT, SHORT + TWICE[:2], [*SHORT, *LONG, *TWICE], [*BAD, *LONG, *ONE_END, *SHORT, *TWICE]],
    ids=["short", "twice", "long", "all"],
)
def test_rows_are_examples_or_dropped_or_rejected(jsonl, caplog, too_long, lines):
    caplog.set_level("INFO", logger="jaxtune")
    path = jsonl(*lines)
    examples = reader(train=path, too_long=too_long, bad_rows="skip").splits().train
    check(examples, lines)
    long = [line for line in lines if line in LONG + ONE_END + TWICE[2:]]
    if too_long == "drop":
        assert examples.dropped == len(long) + (BAD[4] in lines)
    elif too_long == "windows":
        assert examples.windowed == len(long)
        # Every target of every row that is not rejected, once.
        good = [line for line in lines if line not in BAD]
        assert examples.target_count == sum(map(targets_of, good))
    else:
        lost = {"truncate": ONE_END[0], "truncate_start": ONE_END[1]}[too_long]
        also = {"truncate": [], "truncate_start": LONG[3:]}[too_long]
        assert examples.truncated == len([line for line in long if line not in [lost, *also]])
    # What the log says are these very numbers.
    (said,) = (r.message for r in caplog.records if " rows read, " in r.message)
    assert list(map(int, re.findall(r"(\d+) [a-z]", said.split(": ", 1)[1]))) == [
        *(len(lines), len(examples), examples.token_count, examples.target_count),
        *(examples.dropped, examples.truncated, examples.windows, examples.windowed),
        *(examples.duplicates, sum(examples.rejected.values())),
    ]


def test_where_long_rows_are_an_error_none_is_left_out(jsonl):
    lines = [*SHORT, *LONG]
    for bad_rows in ("error", "skip"):
        with pytest.raises(JaxtuneError, match=r":11: 9 tokens"):
            load_examples(jsonl(*lines), tokenizer=None, max_length=LIMIT, bad_rows=bad_rows)
    problems = []
    path = jsonl(*lines, *BAD)
    examples = load_examples(path, tokenizer=None, max_length=LIMIT, problems=problems)
    check(examples, [*lines, *BAD])
    assert len(problems) == sum(examples.rejected.values()) == len(LONG) + len(BAD)


@pytest.mark.parametrize("too_long", ["drop", "truncate", "windows"])
@pytest.mark.parametrize("overlap", ["drop", "keep"])
def test_what_is_held_out_too_is_counted(jsonl, caplog, too_long, overlap):
    train, held_out = [*SHORT, *LONG, *TWICE], [SHORT[0], LONG[0], LONG[1], row(60, 3)]
    options = {"train": jsonl(*train), "eval": jsonl(*held_out, name="eval.jsonl")}
    data = reader(**options, too_long=too_long, overlap=overlap)
    whole, splits = data.read(str(options["train"]), training=True), data.splits()
    check(splits.sets[""], held_out)
    assert splits.train.rows_read == len(train)
    shared = count_overlap(whole, splits.sets[""])
    assert f"{shared} of {len(whole)} training examples are also held out" in caplog.text
    assert len(splits.train) == len(whole) - (shared if overlap == "drop" else 0)


@pytest.mark.parametrize("too_long", ["drop", "truncate", "windows"])
def test_both_sides_of_a_split_are_the_whole(jsonl, too_long):
    lines = [*SHORT, *LONG, *TWICE]
    path = jsonl(*lines)
    data = reader(train=path, eval_split=5, too_long=too_long)
    whole, splits = data.read(str(path), training=True), data.splits()
    held_out = splits.sets[""]
    both = [*splits.train.places, *held_out.places]
    assert sorted(both) == sorted(whole.places)
    numbers = statistics(held_out, other_side=splits.train.row_count)
    rows = numbers["rows"] + numbers["other_side"] + numbers["dropped"]
    assert rows == numbers["rows_read"] == len(lines)
    assert "(of all rows read)" in render_statistics("eval", numbers)


def test_rows_of_every_kind_of_file_are_counted(tmp_path, deepseek):
    """Blank lines are no rows; everything else is an example or named."""
    contents = {
        "a.jsonl": '{"text": "a"}\n\n{"text": ""}\n',
        "b.json": '[{"text": "b"}, 5]',
        "c.csv": "text,id\nc,1\n\n,2\n3\n",
        "d.tsv": "text\tid\nd\t1\n\t\n",
        "e.txt": "e\n\n \nf\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    names = ",".join(str(tmp_path / name) for name in contents)
    examples = load_examples(names, tokenizer=deepseek, max_length=8, bad_rows="skip")
    assert [part.count for part in examples.parts] == [1, 1, 1, 1, 2]
    assert (examples.rows_read, sum(examples.rejected.values())) == (11, 5)
