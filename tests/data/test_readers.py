"""The rules for files hold in every reader: what one kind of file refuses, all kinds refuse."""

from __future__ import annotations

import json

import pytest
from loading import load_examples

from jaxtune.data import read_rows
from jaxtune.errors import JaxtuneError

BOM = b"\xef\xbb\xbf"


def parquet(path, columns):
    """Writes columns, ``(name, values)`` each, and returns the path."""
    import pyarrow
    import pyarrow.parquet

    names = [name for name, _ in columns]
    arrays = [
        values if isinstance(values, pyarrow.Array) else pyarrow.array(values)
        for _, values in columns
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), path)
    return path


def saved(path, rows):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def not_utf8():
    import pyarrow

    return pyarrow.array([b"good", b"\xff"], pyarrow.binary()).view(pyarrow.string())


# What is wrong, the file, its content, and what the error says; a kind of file that is missing from
# a rule cannot break it: a text file has no keys, a binary table no byte-order mark.
BROKEN = [
    ("twice", "x.jsonl", b'{"text": "a", "text": "b"}\n', r'x\.jsonl:1: .*duplicate key "text"'),
    ("twice", "x.json", b'[{"text": "a", "text": "b"}]', r'x\.json: .*duplicate key "text"'),
    ("twice", "x.json", b'{\n"text": "a",\n"text": "b"\n}', r'x\.json: .*"text"'),
    ("twice", "x.csv", b"text,id,text\na,1,b\n", r'x\.csv: duplicate column "text"'),
    ("twice", "x.tsv", b"text\tid\ttext\na\t1\tb\n", r'x\.tsv: duplicate column "text"'),
    ("twice", "x.csv", b'"a\nb","a\nb"\n1,2\n', r'x\.csv: duplicate column "a\\nb"'),
    ("twice", "x.json", b'[{"a\\nb": 1, "a\\nb": 2}]', r'x\.json: .*duplicate key "a\\nb"'),
    ("twice", "x.parquet", [("text", ["a"]), ("text", ["b"])], r'"text"'),
    ("nan", "x.jsonl", b'{"text": "a", "m": [NaN]}\n', r"x\.jsonl:1: .*NaN is not allowed"),
    ("nan", "x.json", b'[{"text": "a", "m": {"n": -Infinity}}]', r"x\.json: .*-Infinity is not"),
    ("nan", "x.parquet", [("text", ["a"]), ("m", [[float("nan")]])], r"row 0: contains nan"),
    ("nan", "saved", [{"text": "a", "m": {"n": float("inf")}}], r"saved row 0: contains inf"),
    (
        "utf8",
        "x.jsonl",
        b'{"text": "a"}\n{"text": "\xe9"}\n',
        r"x\.jsonl:2: not UTF-8 \(byte 11 of",
    ),
    (
        "utf8",
        "x.json",
        b'[{"text": "a"},\n{"text": "\xe9"}]',
        r"x\.json: not UTF-8 \(byte 27 of the f",
    ),
    ("utf8", "x.csv", b"text,id\na,1\nb,\xe9\n", r"x\.csv:3: id is not UTF-8"),
    ("utf8", "x.csv", b"text,\xe9\na,1\n", r"x\.csv: the column names are not UTF-8"),
    ("utf8", "x.tsv", b"text\tid\na\t1\n\xe9\t1\n", r"x\.tsv:3: text is not UTF-8"),
    ("utf8", "x.txt", b"a\n\nb\xe9\n", r"x\.txt:3: not UTF-8 \(byte 2 of the line"),
    ("utf8", "x.parquet", [("text", not_utf8)], r"x\.parquet row 1: not UTF-8"),
    ("nul", "x.jsonl", b'{"text": "a\0"}\n', r"x\.jsonl:1: invalid JSON"),
    ("nul", "x.json", b'[{"text": "a\0"}]', r"x\.json:1: invalid JSON"),
    ("nul", "x.csv", b"text\na\0\n", r"x\.csv:2: text contains a NUL byte"),
    ("nul", "x.tsv", b"text\tid\na\t\0\n", r"x\.tsv:2: id contains a NUL byte"),
    ("nul", "x.txt", b"a\0\n", r"x\.txt:1: text contains a NUL byte"),
    ("utf16", "x.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"x\.jsonl:1: not UTF-8"),
    ("utf16", "x.json", '[{"text": "a"}]'.encode("utf-16"), r"x\.json.*: not UTF-8"),
    ("utf16", "x.csv", "text\na\n".encode("utf-16"), r"x\.csv: the column names are not"),
    ("utf16", "x.txt", "a\n".encode("utf-16"), r"x\.txt:1: not UTF-8"),
    ("short", "x.csv", b"prompt,completion\na,b\na\n", r"x\.csv:3: fewer fields than the header"),
    ("short", "x.tsv", b"prompt\tcompletion\na\n", r"x\.tsv:2: fewer fields than the header \(2\)"),
    (
        "long",
        "x.csv",
        b"prompt,completion\na,b,c\n",
        r"x\.csv:2: more fields than the header \(2\)",
    ),
    (
        "long",
        "x.tsv",
        b"prompt\tcompletion\na\tb\t\n",
        r"x\.tsv:2: more fields than the header \(2\)",
    ),
    ("number", "x.jsonl", b'{"text": 5}\n', r"x\.jsonl:1: text must be a string, not int"),
    ("number", "x.json", b'[{"text": 5.5}]', r"x\.json row 0: text must be a string, not float"),
    ("number", "x.parquet", [("text", [5])], r"x\.parquet row 0: text must be a string, not int"),
    ("number", "x.parquet", [("text", [float("nan")])], r"row 0: text must be a string, not float"),
    ("number", "saved", [{"text": 5}], r"saved row 0: text must be a string, not int"),
    (
        "object",
        "x.jsonl",
        b'[{"text": "a"}]\n',
        r"x\.jsonl:1: expected one JSON object per line.*\.json",
    ),
    ("object", "x.json", b'["a"]', r"x\.json row 0: expected an object, found str"),
    (
        "digits",
        "x.jsonl",
        b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
        "an integer of more than 4300 digi",
    ),
    ("comma", "x.csv", b"prompt;completion\na;b\n", r"x\.csv: a single column.* seems to be ';'"),
    ("comma", "x.tsv", b"prompt,completion\na,b\n", r"x\.tsv: a single column.* seems to be ','"),
    ("quotes", "x.csv", b'text\na\n"b"c\n', r"x\.csv:3: "),
    ("name", "x.txt", b'{"text": "a"}\n', r"x\.txt: contains JSON lines, .* rename it to \.jsonl"),
    (
        "name",
        "x.md",
        b"# Title\n",
        r"x\.md: unknown file format: the suffix is none of \.jsonl, .*not JSON lines",
    ),
    (
        "name",
        "x.xlsx",
        b"PK\x03\x04\x00\xff",
        r"x\.xlsx: unknown file format: ",
    ),
]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [case[1:] for case in BROKEN],
    ids=[f"{case[0]}-{case[1]}-{index}" for index, case in enumerate(BROKEN)],
)
def test_what_is_wrong_is_one_line_that_names_the_place(deepseek, tmp_path, name, content, reason):
    path = tmp_path / name
    if name == "saved":
        saved(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        parquet(path, [(key, values() if callable(values) else values) for key, values in content])
    with pytest.raises(JaxtuneError, match=reason) as caught:
        load_examples(path, tokenizer=deepseek, max_length=64)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["x.csv", "x.tsv", "x.txt", "x.jsonl", "x.parquet"])
def test_a_bad_row_does_not_take_the_others_with_it(deepseek, tmp_path, bad):
    contents = {
        "x.csv": b"text\na\n\xff\n\0\nb,c\nd\n",
        "x.tsv": b"text\tid\na\t1\n\xff\t2\n\0\t3\nb\nd\t1\n",
        "x.txt": b"a\n\xff\n\0\n\xfe\nd\n",
        "x.jsonl": b'{"text": "a"}\n{"text": "\xff"}\n\0\n{\n{"text": "d"}\n',
    }
    path = tmp_path / bad
    if bad in contents:
        path.write_bytes(contents[bad])
    else:
        import pyarrow

        texts = pyarrow.array([b"a", b"\xff", b"\xfe", b"\xfd", b"d"], pyarrow.binary())
        parquet(path, [("text", texts.view(pyarrow.string()))])
    examples = load_examples(path, tokenizer=deepseek, max_length=64, bad_rows="skip")
    assert [deepseek.decode(tokens[:-1])[-1] for tokens in examples.tokens] == ["a", "d"]
    assert sum(examples.rejected.values()) == 3
    assert examples.rows_read == 5


ROWS = [{"prompt": "a", "completion": " b"}, {"prompt": "", "completion": " 你好"}]
LINES = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
GOOD = [
    ("x.jsonl", b"\n".join(LINES)),
    ("x.jsonl", BOM + b"\n \n" + LINES[0] + b"\r\n\r\n" + LINES[1] + b"\r\n"),
    ("x.ndjson", LINES[0] + b"\n" + BOM + LINES[1]),  # files that were joined
    ("x.json", BOM + b"[" + b",\n".join(LINES) + b"]\n"),
    ("x.json", BOM + b"\n".join(LINES)),
    ("x.csv", BOM + 'prompt,completion\na, b\n," 你好"\n'.encode()),
    ("x.csv", "prompt,completion\r\n\r\na, b\r\n  \r\n, 你好\r\n\r\n".encode()),
    ("x.tsv", BOM + 'prompt\tcompletion\na\t b\n\t" 你好"\n'.encode()),
    ("x.unknown", b"\n".join(LINES)),
]


@pytest.mark.parametrize(("name", "content"), GOOD, ids=range(len(GOOD)))
def test_marks_blank_lines_and_line_ends_change_nothing(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [row.values for row in read_rows(tmp_path / name)] == ROWS


def test_an_object_over_several_lines_is_a_row(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert [(row.place, row.values) for row in read_rows(path)] == [(f"{path} row 0", ROWS[0])]


def test_each_line_of_a_text_file_is_a_row_as_in_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "x.txt"
    path.write_bytes('first  \n\n\t第二 {\r\n\u3000\nlast, "quoted"'.encode())
    theirs = datasets.load_dataset(
        "text", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )["text"]
    rows = list(read_rows(path))
    assert [row.values for row in rows] == [{"text": text} for text in theirs if text.strip()]
    assert [row.place for row in rows] == [f"{path}:{n}" for n in (1, 3, 5)]


EMPTY = [("x.jsonl", b""), ("x.json", b"[]"), ("x.json", b"\n"), ("x.csv", b""), ("x.txt", b"\n")]
EMPTY += [("x.csv", b"text\n"), ("x.tsv", b"text\n\n"), ("x.jsonl", BOM), ("x.csv", BOM)]
EMPTY += [("x.parquet", None)]


@pytest.mark.parametrize(("name", "content"), EMPTY, ids=range(len(EMPTY)))
def test_a_file_without_rows_is_named(deepseek, tmp_path, caplog, name, content):
    path, full = tmp_path / name, tmp_path / "full.jsonl"
    full.write_text('{"text": "a"}\n')
    if content is None:
        import pyarrow

        parquet(path, [("text", pyarrow.array([], pyarrow.string()))])
    else:
        path.write_bytes(content)
    examples = load_examples(f"{full},{path}", tokenizer=deepseek, max_length=64)
    assert (len(examples), examples.rows_read) == (1, 1)
    assert f"{path}: the file has no rows" in caplog.text
    with pytest.raises(JaxtuneError, match="no examples"):
        load_examples(path, tokenizer=deepseek, max_length=64)


def test_numbers_in_a_table_of_text_are_text(deepseek, tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion\n2+2, 4\n0.10,NaN\n")
    examples = load_examples(tmp_path / "x.csv", tokenizer=deepseek, max_length=64)
    assert deepseek.decode(examples.tokens[1], skip_special_tokens=True) == "0.10NaN"


def test_nested_nulls_are_what_is_not_there(chatml, tmp_path):
    """A table gives every turn the keys of all others; as JSON has them, they are the same."""
    turns = [
        {"role": "user", "content": "q", "tool_calls": None, "reasoning_content": None},
        {"role": "assistant", "content": "a", "tool_calls": None, "reasoning_content": None},
    ]
    rows = [{"messages": turns, "id": None}]
    (tmp_path / "x.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parquet(tmp_path / "x.parquet", [("messages", [turns]), ("id", [None])])
    saved(tmp_path / "saved", rows)
    found = [
        load_examples(tmp_path / name, tokenizer=chatml, max_length=64).fingerprint()
        for name in ("x.jsonl", "x.json", "x.parquet", "saved")
    ]
    assert len(set(found)) == 1


def test_nul_as_an_escape_is_a_character(deepseek, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\u0000b"}\n')
    parquet(tmp_path / "x.parquet", [("text", ["a\0b"])])
    texts = [
        deepseek.decode(
            load_examples(tmp_path / name, tokenizer=deepseek, max_length=9).tokens[0][:-1]
        )
        for name in ("x.jsonl", "x.parquet")
    ]
    assert [text[-3:] for text in texts] == ["a\0b"] * 2


NOT_ROWS = [
    (
        {"alpaca_en": {"file_name": "alpaca_en.json"}, "b": {"hf_hub_url": "x/y"}},
        "not a data row: it is a list of data sets, as in LLaMA-Factory",
    ),
    ({"version": "1", "data": [{"text": "a"}]}, 'it has its rows under "data"'),
    ({"prompts": {"0": "a", "1": "b"}, "answers": {"0": "c", "1": "d"}}, "a table by columns"),
    ({"prompts": ["a", "b"], "answers": ["c", "d"]}, "a table by columns"),
    ({"features": {}, "splits": {}, "citation": ""}, "a saved data set; use its directory"),
    (
        {"q": "a", "a": "b"},
        "the keys q, a match no known format.*known: messages .*; rename",
    ),
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(("value", "reason"), NOT_ROWS, ids=range(len(NOT_ROWS)))
def test_objects_that_are_not_rows_raise_specific_errors(deepseek, tmp_path, value, reason, indent):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value, indent=indent))
    with pytest.raises(JaxtuneError, match=reason):
        load_examples(path, tokenizer=deepseek, max_length=64)


def test_the_files_of_a_directory_are_read(tmp_path, deepseek):
    directory = tmp_path / "data"
    directory.mkdir()
    for name in ("b", "a"):
        (directory / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (directory / ".hidden.jsonl").write_text("{")
    (directory / "LICENSE").write_text("…")
    assert [row.values["text"] for row in read_rows(directory)] == ["a", "b"]
    examples = load_examples(f"{directory}@2", tokenizer=deepseek, max_length=64)
    assert examples.parts[0].weight == 2


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("train.jsonl", "test.jsonl"), r"test\.jsonl seems to be another split; name the f"),
        (("a.jsonl", "a_eval.jsonl"), r"a_eval\.jsonl seems to be another split"),
        (("a.jsonl", "b.csv", "README.txt"), r"several formats \(\.csv, \.jsonl, \.txt\)"),
        (("dataset_info.json", "a.json"), r"contains dataset_info\.json.*found: a\.js"),
        (("notes.md",), r"no data files \(\.jsonl, .*\) or data set"),
        ((), "no data files"),
    ],
)
def test_a_directory_that_is_not_one_data_set_is_an_error(tmp_path, names, reason):
    directory = tmp_path / "data"
    directory.mkdir()
    for name in names:
        (directory / name).write_text("{}")
    with pytest.raises(JaxtuneError, match=reason) as caught:
        list(read_rows(directory))
    assert "\n" not in str(caught.value)


def test_the_reason_why_a_data_set_cannot_be_read_is_shown(tmp_path):
    """`datasets` hides it behind "an error occurred while generating the dataset"."""
    (tmp_path / "data" / "parts").mkdir(parents=True)
    (tmp_path / "data" / "parts" / "train.jsonl").write_text('{"text": "a", "text": "b"}\n')
    with pytest.raises(JaxtuneError, match=r"or data set: .*text.* twice"):
        list(read_rows(tmp_path / "data"))


def test_latest_is_not_the_name_of_a_split(tmp_path):
    for name in ("latest.jsonl", "contest.jsonl", "devices.jsonl", "evaluate-me.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    assert len(list(read_rows(tmp_path))) == 4


def test_a_split_of_a_data_set_without_splits_is_an_error(tmp_path):
    path = saved(tmp_path / "saved", [{"text": "a"}])
    with pytest.raises(JaxtuneError, match='saved: no split "test"'):
        list(read_rows(f"{path}:test"))
