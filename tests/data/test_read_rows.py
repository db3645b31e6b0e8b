"""Rows come with their place, and a line that is no JSON object is refused by name."""

import os
import subprocess
import sys

import pytest

from jaxtune.data import read_rows
from jaxtune.errors import JaxtuneError


def test_rows_carry_file_and_line(jsonl):
    path = jsonl({"a": 1}, {"a": "你好"}, "", "  ")
    rows = list(read_rows(path))
    assert [row.place for row in rows] == [f"{path}:1", f"{path}:2"]
    assert [row.values for row in rows] == [{"a": 1}, {"a": "你好"}]


def test_a_byte_order_mark_and_line_separators_inside_strings_are_fine(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\r\n{"a": "z"}'.encode())
    assert [row.values["a"] for row in read_rows(path)] == ["x\u2028y", "z"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": 1', "invalid JSON"),
        ("[1, 2]", "expected one JSON object per line (JSONL), found list"),
        ("17", "found int"),
        ('{"a": NaN}', "NaN is not allowed"),
        ('{"a": -Infinity}', "-Infinity is not allowed"),
        ('{"a": 1, "b": 2, "a": 3}', 'duplicate key "a"'),
        ('{"m": [{"role": "user", "role": "tool"}]}', 'duplicate key "role"'),
        ('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", "invalid JSON"),
    ],
)
def test_a_bad_line_is_named(jsonl, line, reason):
    path = jsonl({"a": 1}, line)
    with pytest.raises(JaxtuneError) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    with pytest.raises(JaxtuneError, match=r"rows.jsonl:2: not UTF-8 \(byte 8 of the line"):
        list(read_rows(path))


def test_a_missing_file_names_the_closest_one(jsonl):
    path = jsonl({"a": 1}, name="train.jsonl")
    with pytest.raises(
        JaxtuneError, match=r'trian\.jsonl: no such file; did you mean ".*/train.jsonl"'
    ):
        read_rows(path.with_name("trian.jsonl"))
    with pytest.raises(JaxtuneError, match=r"\./nowhere: no such file"):
        read_rows("./nowhere")
    with pytest.raises(JaxtuneError, match=r"set data\.train"):
        read_rows("")


def test_a_file_that_cannot_be_read_is_named():
    # The kernel lets a process open its own memory, and fails the read of its first page.
    with pytest.raises(JaxtuneError, match="/proc/self/mem: Input/output error"):
        list(read_rows("/proc/self/mem"))


def test_saved_data_sets_and_their_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]
    plain, split = str(tmp_path / "plain"), str(tmp_path / "split")
    datasets.Dataset.from_list(rows).save_to_disk(plain)
    datasets.DatasetDict(
        train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list(rows[:1])
    ).save_to_disk(split)

    assert [row.values for row in read_rows(plain)] == rows
    assert [row.place for row in read_rows(plain)] == [f"{plain} row 0", f"{plain} row 1"]
    assert [row.values for row in read_rows(split)] == rows
    assert [row.values for row in read_rows(f"{split}:test")] == rows[:1]
    with pytest.raises(JaxtuneError, match='no split "tset"; did you mean "test"'):
        list(read_rows(f"{split}:tset"))
    with pytest.raises(JaxtuneError, match="three/part/name: no such file"):
        list(read_rows("three/part/name"))


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "HF_ENDPOINT"])
def test_a_misspelled_name_does_not_wait_for_the_hub(tmp_path, offline):
    # The hub's clients would retry for 24 s; importing them is not counted.
    (tmp_path / "data" / "mine").mkdir(parents=True)
    program = (
        "import time, datasets\n"
        "from jaxtune.data.rows import read_rows\n"
        "from jaxtune.errors import JaxtuneError\n"
        "start = time.monotonic()\n"
        "try: list(read_rows('datta/mine'))\n"
        "except JaxtuneError as error: print(error)\n"
        "print(time.monotonic() - start)\n"
    )
    value = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}[offline]
    environment = os.environ | {"HF_HOME": str(tmp_path), offline: value}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    message, seconds = done.stdout.splitlines()
    assert message.startswith("datta/mine: no such file or data set: the hub is out of reach (")
    assert offline in message and message.endswith('; did you mean "data/mine"?')
    assert float(seconds) < 15
